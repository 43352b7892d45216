"""The roofline's arithmetic, and how kernels' times are matched with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import Problem, Work


def test_attention_alone_is_dense_work_at_density_one() -> None:
    work = roofline.work_of(Problem(heads=2, tokens=6400, dim=64, element=2, density=1.0))["attend"]
    dense = 2 * 4 * 6400 * 6400 * 64
    low_band_and_first_order = 2 * (4 * 6400 * 100 * 64 + 2 * 6400 * 64 * 64)
    assert work.flops == dense + low_band_and_first_order


def test_every_kernel_that_a_call_launches_has_a_floor() -> None:
    pytest.importorskip("triton")
    from freqopt.cli.kernels import kernels_of
    from freqopt.kernels.variant import Variant

    known = set(roofline.work_of(Problem(1, 6400, 64, 2, 0.1)))
    launched = {s.function.__name__ for s in kernels_of(Variant(90, "float16", 64, False)).values()}
    small = {"limits_kernel", "merge_kernel", "text_kernel"}
    attend = {"attend_kernel", "attend_hopper_kernel"}
    assert launched - small == (known - {"attend"}) | attend


def test_floor_is_set_by_the_slower_of_memory_and_products() -> None:
    assert roofline.floor_ms(Work(4.8e9, 1e9), 989.0, 4.8) == (pytest.approx(1.0), "memory")
    assert roofline.floor_ms(Work(1e6, 989e9), 989.0, 4.8) == (pytest.approx(1.0), "products")


def test_rows_pair_times_with_floors_and_sum_the_rest(tmp_path: Path) -> None:
    work = roofline.work_of(Problem(24, 32_760, 128, 2, 0.1))
    times = {"attend_hopper_kernel": 2.5, "score_kernel": 0.3, "a reduction": 0.1, "a cast": 0.2}
    rows = roofline.rows_of(times, work, 989.0, 4.8)
    assert [row["kernel"] for row in rows] == [
        "attend_hopper_kernel",
        "score_kernel",
        "everything else",
    ]
    assert 0 < rows[0]["of_floor"] < 1 and rows[0]["bound"] == "products"
    assert rows[2]["ms"] == pytest.approx(0.3)
    roofline.plot([{"tokens": 32_760, "density": 0.1, "rows": rows}], "test", tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_table_sums_everything_but_attention() -> None:
    rows = [
        {"kernel": "attend_hopper_kernel", "ms": 9.0, "floor_ms": 8.0, "bound": "products"},
        {"kernel": "score_kernel", "ms": 0.5, "floor_ms": 0.25, "bound": "products"},
        {"kernel": "everything else", "ms": 0.25, "floor_ms": None},
    ]
    where = dict.fromkeys(("device", "torch", "triton", "commit", "command"), "x")
    times = {"graph_ms": 9.6, "other_ms": 0.6, "other_share": 0.0625}
    problem = {"heads": 2, "tokens": 9000, "density": 0.1, **times, "rows": rows}
    result = {"environment": where, "problems": [{**problem, "tokens": 10}, problem]}
    lines = roofline.table(result)
    assert (
        "9,000 tokens at 10.0 % density" in lines[0]
        and "| `score_kernel` | 0.500 | 0.25 (products) |" in lines
    )
    assert "| all but attention, one after the other | 0.750 | 0.25 |" in lines
    assert lines[-1] == "| all but attention, as a call runs them | 0.600, 6.2 % of 9.60 ms | |"


def test_what_an_order_costs_is_a_table_of_its_own() -> None:
    """Four levels of halves above the leaves of 64; kernels that serve any order are elsewhere."""
    problem = Problem(24, 32_760, 128, 2, 0.1, chunk=1024)
    work = roofline.work_of(problem)
    assert work["halve_kernel"].bytes == 4 * work["leaf_kernel"].bytes
    assert work["project_kernel"].bytes > 24 * 32_760 * 256
    times = {"halve_kernel": 0.2, "leaf_kernel": 0.1, "score_kernel": 0.3}
    rows = roofline.rows_of(times, work, 989.0, 4.8)
    row = {"heads": 24, "tokens": 32_760, "chunk": 1024, "density": 0.1, "graph_ms": 3.0}
    lines = roofline.tables_of_orders({"problems": [{"chunk": 0}, {**row, "rows": rows}]})
    assert "in chunks of 1,024: 0.300 ms, 10.0 % of a call of 3.00 ms" in lines[0]
    assert [line.split("`")[1] for line in lines if "`" in line] == ["halve_kernel", "leaf_kernel"]


def test_devices_by_name() -> None:
    assert roofline.data_sheet("NVIDIA H200") == (989.0, 4.8)
    assert roofline.data_sheet("NVIDIA GeForce RTX 4090") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        roofline.main([])
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
