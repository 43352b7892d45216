"""The measured tables of docs/calibration.md are those of the result file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

# Loaded by its path: putting the root on sys.path would make `kernels` importable from there.
SPEC = importlib.util.spec_from_file_location(
    "benchmarks_calibration_page",
    Path(__file__).parents[2] / "benchmarks" / "calibration_page.py",
)
assert SPEC is not None and SPEC.loader is not None
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


def test_the_page_says_what_the_result_file_says() -> None:
    text = page.PAGE.read_text()
    assert text.split(page.BEGIN)[1].split(page.END)[0].strip() == page.measured()


def test_rows(tmp_path: Path) -> None:
    variants = [
        {"variant": name, "wanted_density": d, "density": d - 0.001, "error": 0.01, "psnr": 37.0}
        for name in ("calibrated", "one threshold for all")
        for d in (0.1, 0.05)
    ]
    result = {
        "environment": {"device": "a GPU", "torch": "2.11", "commit": "abc"},
        "settings": {
            "frames": 21, "height": 120, "width": 208, "steps": 25, "dtype": "bfloat16",
            "samples": 8, "seeds": 2,
        },
        "variants": variants,
        "summary": {"PSNR at the first density, dB": 37.0, "calibration, s": None},
    }  # fmt: skip
    (tmp_path / "calibration.json").write_text(json.dumps(result))
    said = page.measured(tmp_path / "calibration.json")
    assert "21 x 30 x 52 = 32,760 tokens" in said
    assert "| PSNR at 10% density, dB | 37 | at least 36 (aim 42) |" in said
    assert "| calibration, s | not measured |" in said
    assert "| calibrated | 9.9%; 0.0100; 37.0 dB | 4.9%; 0.0100; 37.0 dB |" in said
    assert page.measured(tmp_path / "none.json") == "There is no result file yet."
    del result["variants"]
    (tmp_path / "calibration.json").write_text(json.dumps(result))
    said = page.measured(tmp_path / "calibration.json")
    assert "| PSNR at the first density, dB | 37 | at least 36 (aim 42) |" in said
    assert "| budgets |" not in said
