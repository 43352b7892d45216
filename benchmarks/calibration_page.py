"""Writes the measured tables of docs/calibration.md: `python -m benchmarks.calibration_page`.

Every figure in them comes from benchmarks/results/: `benchmarks.calibration` wrote
calibration.json, `benchmarks.adaptive` wrote adaptive.json and, on a CPU, adaptive_cpu.json.
`--check` fails where the page says something else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS, RESULTS, markers, rewrite

PAGE = DOCS / "calibration.md"
NAME = "calibration"
BEGIN, END = markers(NAME)

ADAPTIVE = {
    "": "the plan's thresholds",
    "adapted_": "with `adapt`",
    "pinned_": "scaled to equal density",
}

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


def adaptive_rows(result: dict[str, Any], name: str) -> Iterator[str]:
    """What `benchmarks.adaptive` measured, in Markdown. name: of the result file."""
    where, grid, found = result["environment"], result["grid"], dict(result["summary"])
    worst = found.pop("largest / smallest")
    yield (
        f"{where['device']}, torch {where['torch']}, commit {where['commit']}: "
        f"{' x '.join(map(str, grid))} = {math.prod(grid):,} tokens, a plan for "
        f"{result['target']:.0%}, {len(result['rows']) // len(found)} calls of each "
        f"([numbers](../benchmarks/results/{name}.json), "
        f"[picture](../benchmarks/results/{name}.png)):"
    )
    yield ""
    yield f"| error of the output (density) | {' | '.join(found)} | largest / smallest error |"
    yield "|---|" + "---|" * (len(found) + 1)
    for prefix, way in ADAPTIVE.items():
        cells = [
            f"{row[prefix + 'error']:.2%} ({row[prefix + 'density']:.1%})" for row in found.values()
        ]
        yield f"| {way} | {' | '.join(cells)} | {worst[prefix + 'error']:.2f} |"


def adaptive() -> str:
    """The same from all result files that there are."""
    tables = [
        "\n".join(adaptive_rows(json.loads((RESULTS / f"{name}.json").read_text()), name))
        for name in ("adaptive", "adaptive_cpu")
        if (RESULTS / f"{name}.json").exists()
    ]
    return "\n\n".join(tables)


def main() -> None:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    said = {NAME: measured(), "adaptive": adaptive()}
    same = [rewrite(PAGE, name, text, check=check) for name, text in said.items()]
    if not all(same) and check:
        sys.exit(
            "docs/calibration.md differs from benchmarks/results/: run "
            "`python -m benchmarks.calibration_page`"
        )


if __name__ == "__main__":
    main()
