"""The benchmark of the passes' time, on few layers: what they may take beside inductor."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from benchmarks.passes import LIMIT_SHARE, main, measure


def test_passes_cost_little_beside_inductor() -> None:
    times = measure(2)
    assert times.split == 2 and times.nodes > 200
    assert 0 < times.passes < LIMIT_SHARE * times.inductor


@pytest.mark.slow
def test_sixty_layers_take_less_than_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--layers", "60"]) == 0
    assert "60 sites split" in capsys.readouterr().out
