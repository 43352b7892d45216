"""benchmarks/export.py on the CPU: what it prepares is the op, and what is wrong is a wrong row."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("triton")

from benchmarks import export
from benchmarks.export import CASES, Case, describe, measure, prepare
from freqopt.kernels.specialise import hopper_specialisation

# Kernels of the variants that test_onnx_cuda and test_onnx_hopper compile, too.
PLAIN = Case("plain", "bfloat16", 128, (4, 8, 9), 2, "attend_hopper", density=0.25)
TEXT = Case(
    "text",
    "float16",
    64,
    (3, 5, 7),
    4,
    "attend_hopper",
    batch=2,
    kv_heads=2,
    before=3,
    after=6,
    masked=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prepared")
    prepare(made, 90, [PLAIN, TEXT])
    return made


def test_the_body_is_the_op(folder: Path) -> None:
    rows = measure(folder, "cpu", [PLAIN, TEXT])["rows"]
    assert [row["name"] for row in rows] == ["plain", "text"]
    for row in rows:
        assert "wrong" not in row, row["wrong"]
        assert set(row["ms"]) == {"pytorch", "body"}
        assert row["nodes"]["body"]["CPUExecutionProvider"]["Scan"] >= 1
        assert "x PyTorch" in describe(row) and "body CPUExecutionProvider" in describe(row)


def test_a_wrong_output_has_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = export.in_torch
    monkeypatch.setattr(export, "in_torch", lambda case, tensors: right(case, tensors) * 1.05)
    (row,) = measure(folder, "cpu", [PLAIN])["rows"]
    assert "ms" not in row and "body is off by 0.0" in row["wrong"][0]
    assert describe(row).splitlines()[1].startswith("  WRONG: body is off by")


def test_a_row_that_raises_leaves_the_others(folder: Path) -> None:
    absent = Case("absent", "float16", 72, (3, 3, 3), 2, "attend")
    rows = measure(folder, "cpu", [absent, PLAIN])["rows"]
    assert "split_float16_72.onnx" in rows[0]["wrong"][0] and "ms" in rows[1]


def test_cases_name_the_kernel_that_the_table_has() -> None:
    for case in CASES:
        served = hopper_specialisation(case.variant(90)) is not None
        assert case.attend == ("attend_hopper" if served else "attend"), case.name
