"""Writes the measured tables of docs/calibration.md: `python -m benchmarks.calibration_page`.

Every figure in them comes from benchmarks/results/calibration.json, which `benchmarks.calibration`
wrote. `--check` fails where the page says something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS, RESULTS, markers, rewrite

PAGE = DOCS / "calibration.md"
NAME = "calibration"
BEGIN, END = markers(NAME)

WANTED = {
    "error on unseen samples / target": "at most 1.1 (aim 0.8 to 1.0)",
    "density at equal error, calibrated / uniform": "at most 0.75 (aim 0.5)",
    "PSNR at the first density, dB": "at least 36 (aim 42)",
    "PSNR at the second density, dB": "at least 31 (aim 36)",
    "calibration, s": "at most 120 (aim 30)",
    "probe error, rank correlation over calls": "at least 0.9 (aim 0.97)",
    "probe error / true error": "0.9 to 1.1",
}


def rows(result: dict[str, Any]) -> Iterator[str]:
    """The targets' table and the variants', in Markdown."""
    where, settings = result["environment"], result["settings"]
    grid = f"{settings['frames']} x {settings['height'] // 4} x {settings['width'] // 4}"
    tokens = settings["frames"] * settings["height"] * settings["width"] // 16
    yield (
        f"{where['device']}, torch {where['torch']}, commit {where['commit']}: zoo DiT at {grid} = "
        f"{tokens:,} tokens, {settings['dtype']}, {settings['steps']} steps, "
        f"{settings['samples']} samples, {settings['seeds']} seeds "
        f"([numbers](../benchmarks/results/calibration.json), "
        f"[picture](../benchmarks/results/calibration.png)):"
    )
    yield ""
    yield "| what | measured | wanted |"
    yield "|---|---|---|"
    variants = result.get("variants", [])  # none yet in a run that was cut off early
    densities = list(dict.fromkeys(row["wanted_density"] for row in variants))
    words = zip(("first", "second"), (densities[:1], densities[-1:]), strict=True)
    named = {word: f"{density:.0%}" for word, found in words for density in found}
    for name, value in result["summary"].items():
        shown = "not measured" if value is None else f"{value:.3g}"
        label = name
        for word, density in named.items():
            label = label.replace(f"at the {word} density", f"at {density} density")
        yield f"| {label} | {shown} | {WANTED.get(name, '')} |"
    if not variants:
        return
    yield ""
    yield (
        "| budgets | "
        + " | ".join(f"density; error; PSNR at {density:.0%}" for density in densities)
        + " |"
    )
    yield "|---|" + "---|" * len(densities)
    for variant in dict.fromkeys(row["variant"] for row in variants):
        found = {r["wanted_density"]: r for r in variants if r["variant"] == variant}
        cells = [
            f"{found[d]['density']:.1%}; {found[d]['error']:.4f}; {found[d]['psnr']:.1f} dB"
            if d in found
            else ""
            for d in densities
        ]
        yield f"| {variant} | " + " | ".join(cells) + " |"


def measured(path: Path = RESULTS / "calibration.json") -> str:
    """Everything between the page's markers."""
    if not path.exists():
        return "There is no result file yet."
    return "\n".join(rows(json.loads(path.read_text())))


def main() -> None:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    if not rewrite(PAGE, NAME, measured(), check=check) and check:
        sys.exit(
            "docs/calibration.md differs from benchmarks/results/: run "
            "`python -m benchmarks.calibration_page`"
        )


if __name__ == "__main__":
    main()
