"""The benchmark of launches says what it measured, and that it needs a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import launches


def test_times_stand_beside_errors() -> None:
    ways = {
        "one by one": {"launched_ms": 1.7, "whole_ms": 1.75},
        "repeated": {"launched_ms": 0.7, "whole_ms": 0.78},
    }
    call = {"heads": 24, "density": 0.1, "l1": 0.03, "l2": 0.0432, "gpu_ms": 3.21, "ways": ways}
    step = {"launched_ms": 5.0, "whole_ms": 13.2}
    result = {
        "calls": [{**call, "chunk": 0}, {**call, "chunk": 1024}],
        "steps": {"dense": step, "one by one": {**step, "l2": 0.03}, "repeated": step},
    }
    said = "\n".join(launches.tables(result))
    times = "0.100 | 0.0432 | 3.21 ms | 1.75 ms | 0.78 ms | 1.70 ms and 0.70 ms |"
    assert f"| 24 | grid | {times}" in said and f"| 24 | content 1,024 | {times}" in said
    assert "| one by one | 13.20 ms | 5.00 ms | 0.0300 |" in said
    assert "| dense | 13.20 ms | 5.00 ms |  |" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launches.main([])
    assert "there is none" in capsys.readouterr().err
