"""What the passes cost: counted in calls, which is the same everywhere; and their benchmark."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import passes
from benchmarks.passes import LIMIT_SHARE, Times, count, main, measure

CALLS_A_LAYER = 50_000
"""More than now by half. A second of all passes for 60 layers is 3 million in all."""


def test_passes_do_as_much_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows faster than the graph would show, and so would a pass that does twice as much."""
    # pytest's own handler would have whole graphs printed for torch's structured trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    found = []
    for layers in (1, 2, 6, 10):  # the first fills caches
        torch._dynamo.reset()
        calls, split = count(layers)
        assert split == layers
        found.append(calls)
    _, few, some, many = found
    assert many - some == pytest.approx(some - few, rel=0.1)
    assert 1_000 < (many - few) / 8 < CALLS_A_LAYER


def test_the_benchmark_takes_inductor_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for inductor, which takes a known time."""
    import time

    def slow(gm: torch.fx.GraphModule, inputs: object) -> object:
        time.sleep(0.2)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", slow)
    started = time.perf_counter()
    times = measure(2)
    whole = time.perf_counter() - started
    assert times.split == 2 and times.nodes > 200
    assert times.inductor >= 0.2 and 0 < times.passes < whole - times.inductor


def test_too_slow_is_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(passed: float, split: int = 60) -> int:
        times = Times(passes=passed, inductor=10.0, nodes=9, split=split)
        monkeypatch.setattr(passes, "measure", lambda layers: times)
        return main(["--layers", "60"])

    assert (status(0.4), status(0.6), status(0.4, split=59)) == (0, 1, 1)
    assert LIMIT_SHARE * 10.0 == 0.5


@pytest.mark.slow
def test_sixty_layers_take_less_than_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """And less than a twentieth of inductor's time."""
    assert main(["--layers", "60"]) == 0
    assert "60 sites split" in capsys.readouterr().out
