"""The README's figures are those of the result files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

# Loaded by its path: putting the root on sys.path would make `kernels` importable from there.
SPEC = importlib.util.spec_from_file_location(
    "benchmarks_readme", Path(__file__).parents[2] / "benchmarks" / "readme.py"
)
assert SPEC is not None and SPEC.loader is not None
readme = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme)


@pytest.mark.smoke
def test_readme_says_what_the_result_files_say() -> None:
    text = readme.README.read_text()
    shown = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert shown == readme.measured()
    assert readme.other_gpu(check=True)


def test_rows_carry_error_and_density_beside_every_time(tmp_path: Path) -> None:
    problem: dict[str, Any] = {
        "heads": 24, "tokens": 32760, "dtype": "torch.bfloat16", "dense_ms": {"cudnn": 22.9},
        "rows": [{"density": 0.1, "l1": 0.06, "l2": 0.05, "ms": 4.0, "speedup": 5.7}],
    }  # fmt: skip
    where = {"device": "a GPU", "torch": "2.11", "commit": "abc"}
    (tmp_path / "attention.json").write_text(
        json.dumps({"environment": where, "problems": [problem]})
    )
    said = readme.measured(tmp_path)
    assert "| 10.0 % | 0.0600 | 0.0500 | 4.00 ms | 5.70x |" in said and "a GPU" in said
    problem["rows"][0]["other_share"] = 0.0804
    (tmp_path / "attention.json").write_text(
        json.dumps({"environment": where, "problems": [problem]})
    )
    assert "| 5.70x | 8.0 % |" in readme.measured(tmp_path)
    assert "No GPU figures" in readme.measured(tmp_path / "empty")
