"""Generated pages say what the result files say, and what is wanted of them can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import itertools

from benchmarks import (
    calibration_page,
    composition_page,
    docs,
    models,
    picture,
    readme,
    results_pages,
)
from benchmarks.pages import RESULTS, between, filled

WHERE = {"device": "a GPU", "torch": "2.11", "commit": "abc", "command": "python -m it"}


@pytest.mark.smoke
def test_generated_pages_are_up_to_date() -> None:
    assert not docs.stale(), "run `python -m benchmarks.docs`"


def test_a_page_that_differs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, other = tmp_path / "results" / "a.md", tmp_path / "results" / "b.md"
    page.parent.mkdir()
    page.write_text("as it should be\n")
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "wanted", lambda: {page: "as it should be\n"})
    docs.main(["--check"])
    other.write_text("nobody makes this")
    with pytest.raises(SystemExit, match=r"results/b\.md"):
        docs.main(["--check"])
    other.unlink()
    page.write_text("edited by hand\n")
    with pytest.raises(SystemExit, match=r"results/a\.md"):
        docs.main(["--check"])
    docs.main([])
    assert page.read_text() == "as it should be\n"


def test_every_result_file_is_on_a_page() -> None:
    used = {name for page in results_pages.present() for name in page.files}
    used.add("ways")  # docs/works-with.md has a table of it
    assert used == {path.stem for path in RESULTS.glob("*.json")}


def test_markers() -> None:
    page = "before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n"
    assert between(page, "x")[1].strip() == "old"
    assert filled(page, "x", "new") == page.replace("old", "new")


def attention_problem(**more: Any) -> dict[str, Any]:
    row = {"density": 0.1, "l1": 0.06, "l2": 0.05, "ms": 4.0, "speedup": 5.7, **more}
    return {
        "heads": 24,
        "tokens": 32760,
        "head_dim": 128,
        "dtype": "torch.bfloat16",
        "dense_ms": {"cudnn": 22.9, "flash": 30.0},
        "rows": [row, {**row, "density": 0.3}],
    }


def test_rows_carry_error_and_density_beside_every_time(tmp_path: Path) -> None:
    said = readme.summary({"environment": WHERE, "problems": [attention_problem()]})
    assert "a GPU, torch 2.11, commit abc." in said
    assert "| 32,760 | 10 % | 0.0600 | 0.0500 | 4.00 ms | 22.9 ms | **5.70x** |" in said
    assert not any("30 %" in line for line in said)
    every = readme.attention({"problems": [attention_problem(other_share=0.0804)]})
    assert "| 10.0 % | 0.0600 | 0.0500 | 4.00 ms |  | 5.70x | 8.0 % |" in every
    assert "| 30.0 % | 0.0600 | 0.0500 | 4.00 ms |  | 5.70x | 8.0 % |" in every
    assert "No GPU figures" in readme.measured(tmp_path / "empty")


def test_calibration_rows() -> None:
    variants = [
        {"variant": name, "wanted_density": d, "density": d - 0.001, "error": 0.01, "psnr": 37.0}
        for name in ("calibrated", "one threshold for all")
        for d in (0.1, 0.05)
    ]
    result = {
        "environment": WHERE,
        "settings": {
            "frames": 21,
            "height": 120,
            "width": 208,
            "steps": 25,
            "dtype": "bfloat16",
            "samples": 8,
            "seeds": 2,
        },
        "variants": variants,
        "summary": {"PSNR at the first density, dB": 37.0, "calibration, s": None},
    }
    said = "\n".join(calibration_page.rows(result))
    assert "21 x 30 x 52 = 32,760 tokens" in said
    assert "| PSNR at 10% density, dB | 37 | at least 41 at 10 % (aim: 43) |" in said
    assert "| calibration, s | not measured |" in said
    assert "| calibrated | 9.9%; 0.0100; 37.0 dB | 4.9%; 0.0100; 37.0 dB |" in said
    del result["variants"]
    said = "\n".join(calibration_page.rows(result))
    assert "| PSNR at the first density, dB | 37 | at least 41 at 10 % (aim: 43) |" in said
    assert "| budgets |" not in said


def test_the_picture_is_of_the_real_token_order() -> None:
    path = picture.cells()
    assert sorted(path) == [(row, column) for row in range(8) for column in range(8)]
    steps = itertools.pairwise(path)
    assert all(abs(r - s) + abs(c - d) == 1 for (r, c), (s, d) in steps)
    tile = picture.parts(picture.TILE)[picture.SHOWN]
    exact = [picture.is_exact(tile, block) for block in picture.parts(picture.BLOCK)]
    assert any(exact) and not all(exact)


def test_models_table() -> None:
    row = ["`A`", "2 of 4", "self", "none", "3 x 6 x 10", "graph", "2 cross", ""]
    lines = models.table([row])
    assert len(lines) == 3 and lines[2].startswith("| `A` | 2 of 4 |")


def test_rivals_are_shown_with_what_failed_and_what_is_missing() -> None:
    rows = [
        {"name": "slow", "setting": "s", "density": None, "l1": 0.1, "l2": 0.2, "ms": 9.0},
        {"name": "fast", "setting": "t", "density": 0.1, "l1": 0.1, "l2": 0.3, "ms": 1.0},
    ]
    failed = [{"name": "bad", "setting": "", "failed": "RuntimeError: no"}]
    missing = [{"name": "absent", "install": "pip install it", "why": "no module"}]
    said = readme.rivals({"rows": rows, "failed": failed, "missing": missing})
    assert said[2:4] == [
        "| fast | t | 10.0 % | 0.1000 | 0.3000 | 1.00 ms |",
        "| slow | s |  | 0.1000 | 0.2000 | 9.00 ms |",
    ]
    assert "`RuntimeError: no`." in said and said[-1] == "- absent: pip install it"
    own = [{"setting": "our route at 5 %", "ms": 0.5}, {"setting": "our route at 10 %", "ms": 0.75}]
    said = readme.rivals({"rows": rows, "failed": [], "missing": [], "own_kernel": own})
    assert said[-1] == "0.50 ms (our route at 5 %), 0.75 ms (our route at 10 %)."


def test_plans_on_others_models_are_shown_by_what_was_asked_for() -> None:
    floor = {"clip": "a", "target": None, "l2": 1e-5, "cosine": 1.0, "ms": 2.0, "dense_ms": 2.0}
    planned = {**floor, "l2": 0.02, "density": 0.05, "ms": 1.0}
    rows = [floor, {**planned, "target": 0.03}, {**planned, "wanted": 0.2}]
    said = readme.real({"rows": [{**row, "words_changed": 0.25} for row in rows]})
    assert "| words changed |" in said[0]
    assert said[2] == "| a | noise floor |  | 1e-05 | 1.00000 | 25.0 % | 2.0 ms | 1.00x |"
    assert said[3] == "| a | an error of 0.03 | 5.0 % | 0.02 | 1.00000 | 25.0 % | 1.0 ms | 2.00x |"
    assert said[4].startswith("| a | a density of 20 % | 5.0 % |")
    said = readme.real({"rows": [{**row, "same_matches": 0.9} for row in rows]})
    assert "| same matches |" in said[0] and "| 90.0 % |" in said[2]


def test_generations_are_shown_clip_by_clip() -> None:
    close = {"psnr_db": 40.0, "ssim": 0.99, "ssim_scales": 0.995}
    rows = [
        {"seed": 0, "method": "another dense backend", **close},
        {"seed": 0, "method": "freqopt", "density": 0.1, "dense_steps": 2, **close},
    ]
    said = readme.generations({"rows": rows})
    assert said[3] == "| 0 | freqopt | 10 % | 2 | 40.0 dB | 0.9900 | 0.9950 |"
    assert not list(results_pages.about_objects({"rows": rows}))
    kept = {"objects_kept": 0.955, "frames_with_all": 0.5}
    rows = [{**row, **kept, "objects": count} for count, row in enumerate(rows)]
    said = readme.generations({"rows": rows})
    assert said[2].endswith("| 0.9950 | has none | has none |")
    assert said[0].endswith("| SSIM at scales | objects kept | frames with all objects |")
    assert said[3].endswith("| 0.9950 | 96 % | 50 % |")
    assert list(results_pages.about_objects({"rows": rows}))


def test_a_composition_shows_both_models_and_what_has_no_figure() -> None:
    rows = [
        {"attention": "dense", "with": "nothing else", "step_s": 0.6, "error": 0.0},
        {"attention": "split", "with": "first-block cache", "step_s": 0.2, "error": 0.0123}
        | {"computed": 0.4},
        {"attention": "split", "with": "CUDA graphs", "failed": "RuntimeError: no"},
        {"attention": "split", "with": "FP8 linear layers", "absent": "bring it"},
    ]
    zoo = [
        {"attention": "split", "with": "first-block cache", "psnr_db": 31.26, "computed": 0.5},
        {"attention": "split", "with": "FP8 linear layers", "absent": "bring it"},
    ]
    settings = {"layers": 8, "steps": 5, "zoo_steps": 25, "density": 0.1, "cache_threshold": 0.1}
    result = {
        "environment": WHERE,
        "settings": settings,
        "tokens": 32760,
        "density": 0.104,
        "rows": rows,
        "zoo": zoo,
    }
    said = list(composition_page.body(result))
    assert "| first-block cache | split | 0.200 s (40%) | 3.00x | 0.0123 | 31.3 dB (50%) |" in said
    assert "| CUDA graphs | split |  |  |  |  |" in said
    assert said[-2:] == [
        "- CUDA graphs, split: RuntimeError: no",
        "- FP8 linear layers, split: bring it",
    ]
    cut = {"environment": WHERE, "settings": settings, "rows": [], "zoo": zoo}
    assert "| first-block cache | split |  |  |  | 31.3 dB (50%) |" in composition_page.body(cut)
