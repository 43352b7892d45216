"""The example and the benchmark for several GPUs, at tiny size on two processes."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_models import one_accelerator, uneven_plan, wan
from ranks import Ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "wan_ulysses.py"


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def loaded(folder: str, subfolder: str) -> torch.nn.Module:
    """What `from_pretrained` returns, which for this model takes a package that is not here."""
    del folder, subfolder
    return wan()[0]


def run_example(folder: str) -> torch.Tensor:
    from diffusers import WanTransformer3DModel

    one_accelerator()
    WanTransformer3DModel.from_pretrained = loaded
    main = runpy.run_path(str(EXAMPLE))["main"]
    arguments = [folder, f"{folder}/plan.json", "--latents", "3", "12", "20", "--steps", "2"]
    found: torch.Tensor = main([*arguments, "--inner", "eager"])
    return found


def test_the_example_runs(two: Ranks, tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
    model, call = wan()
    with torch.no_grad():
        uneven_plan(model, call).save(tmp_path / "plan.json")
    first, second = two.call(run_example, str(tmp_path))
    assert first.shape == (1, 4, 3, 12, 20) and first.isfinite().all()
    torch.testing.assert_close(first, second)


def run_benchmark(folder: str) -> None:
    one_accelerator()
    main: Any = runpy.run_module("benchmarks.parallel")["main"]
    main(["--tiny", "--out", folder])


def test_the_benchmark_runs(two: Ranks, tmp_path: Path) -> None:
    two.call(run_benchmark, str(tmp_path))
    found = json.loads((tmp_path / "parallel_2.json").read_text())
    assert found["ranks"] == 2 and found["grid"] == [3, 6, 10]
    rows = {row["name"]: row for row in found["rows"]}
    ways = {f"{name}, Ulysses" for name in ("dense", "split", "balanced")}
    assert set(rows) == {*ways, "split, one GPU", "split, all keys"}
    for name, row in rows.items():
        assert len(row["ms"]) == len(row["collectives"]) == len(row["gib"]) == 2
        assert all(0 < share < 1 for share in row["attention"])
        assert min(row["ms"]) > 0 and all(0 <= share < 1 for share in row["collectives"])
        assert row["error"] < (1e-5 if "dense" in name else 0.9)
    assert rows["split, Ulysses"]["error"] > 1e-4
    for name in ("split, Ulysses", "balanced, Ulysses"):
        assert rows[name]["error_of_one_gpu"] < 1e-2 * rows["split, one GPU"]["error"]
    assert (tmp_path / "parallel_2.png").stat().st_size > 10_000
    unbalanced, balanced = (rows[f"{n}, Ulysses"]["error"] for n in ("split", "balanced"))
    assert abs(unbalanced - balanced) < 1e-3 * unbalanced
    assert found["imbalance"]["after"] <= found["imbalance"]["before"]
