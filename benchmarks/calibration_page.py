"""The measured tables of calibration, from benchmarks/results/calibration.json.

`benchmarks.calibration` writes that file, `python -m benchmarks.docs` the page with these tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

TARGETS = {
    "error on unseen samples / target": "0.8 to 1.05",
    "density at equal error, calibrated / uniform": "at most 0.6 (aim: 0.5)",
    "PSNR at the first density, dB": "at least 41 at 10 % (aim: 43)",
    "PSNR at the second density, dB": "at least 36 at 5 % (aim: 38)",
    "calibration, s": "at most 60 on an H200 (aim: 30)",
    "probe error, rank correlation over calls": "at least 0.9 (aim: 0.97)",
    "probe error / true error": "0.9 to 1.1",
}


def rows(result: dict[str, Any]) -> Iterator[str]:
    """The targets' table and the variants', in Markdown."""
    settings = result["settings"]
    grid = f"{settings['frames']} x {settings['height'] // 4} x {settings['width'] // 4}"
    tokens = settings["frames"] * settings["height"] * settings["width"] // 16
    yield f"The zoo's DiT at {grid} = {tokens:,} tokens, {settings['dtype']}."
    yield f"{settings['steps']} steps, {settings['samples']} samples, {settings['seeds']} seeds."
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
        yield f"| {label} | {shown} | {TARGETS.get(name, '')} |"
    yield from ("", *at_equal_error(result))
    if variants:
        yield ""
        yield from budgets(variants, densities)


def at_equal_error(result: dict[str, Any]) -> Iterator[str]:
    """Between which densities curves were compared, in Markdown; nothing without curves."""
    if (ratio := result.get("density_ratio")) is not None:
        densities = [density for density, _ in result["curves"]["calibrated"]]
        yield f"Between densities of {min(densities):.1%} and {max(densities):.1%}"
        yield f"calibrated budgets need {ratio:.3f} of the density of one threshold"
        yield "for the same error of the output (geometric mean)."


def compared(result: dict[str, Any]) -> Iterator[str]:
    """All variants of a run, in Markdown."""
    variants = result["variants"]
    yield from budgets(variants, list(dict.fromkeys(row["wanted_density"] for row in variants)))


def budgets(variants: Sequence[dict[str, Any]], densities: Sequence[float]) -> Iterator[str]:
    """Density, error and PSNR of each way to choose budgets."""
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
