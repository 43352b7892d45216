"""The page of what benchmarks.composition measured: one table of both models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.pages import load, origin, table


def page() -> Iterator[str]:
    """The body of the results' page."""
    yield from body(load("composition"))


def body(result: dict[str, Any]) -> Iterator[str]:
    """Lines below the title; parts that a run was ended before are left out."""
    settings = result["settings"]
    yield from (origin(result), "")
    if "tokens" in result:
        yield "*Step* and *error* are of a transformer as wide as Wan 2.1 14B, weights random:"
        yield f"{settings['layers']} of its 40 layers, {result['tokens']:,} tokens."
        yield "Blocks are compiled, and figures are means over"
        yield f"{settings['steps']} steps of one trajectory, against dense outputs."
        yield f"The split has {result['density']:.1%} of its pairs exact."
    yield f"*PSNR* is of a clip by the zoo's trained model in {settings['zoo_steps']} steps,"
    yield f"against its dense clip; the split has {settings['density']:.0%} of its pairs exact."
    yield f"The cache's threshold is {settings['cache_threshold']:g};"
    yield "in brackets stands the share of steps that ran all blocks, or of attention computed."
    yield from ("", *rows(result), *decoded(result))
    reasons = dict.fromkeys(
        f"- {row['with']}, {row['attention']}: {row.get('absent') or row['failed']}"
        for row in [*result["rows"], *result["zoo"]]
        if "absent" in row or "failed" in row
    )
    if reasons:
        yield from ("", "What has no figure:", "", *reasons)


def rows(result: dict[str, Any]) -> list[str]:
    """A row for each addition and attention."""
    large, zoo = (
        {(row["with"], row["attention"]): row for row in result[part]} for part in ("rows", "zoo")
    )
    alone = large.get(("nothing else", "dense"), {}).get("step_s")
    cells = []
    for key in dict.fromkeys([*large, *zoo]):
        row, clip = large.get(key, {}), zoo.get(key, {})
        step, psnr = row.get("step_s"), clip.get("psnr_db")
        cells.append(
            [
                *key,
                "" if step is None else f"{step:.3f} s{share(row)}",
                "" if step is None or alone is None else f"{alone / step:.2f}x",
                "" if step is None else f"{row['error']:.4f}",
                "" if psnr is None else f"{psnr:.1f} dB{share(clip)}",
            ]
        )
    return table(["with", "attention", "step", "against dense alone", "error", "PSNR"], cells)


def decoded(result: dict[str, Any]) -> list[str]:
    """A row for each way to decode; nothing where a run has none."""
    found = result.get("decoded", [])
    if not found:
        return []
    cells = [
        [
            row["with"],
            row["attention"],
            f"{row['decode_s']:.2f} s",
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB",
            f"{row['error']:.4f}",
        ]
        for row in found
    ]
    return [
        "",
        "Latents of one step, decoded by Wan's autoencoder with random weights;",
        "errors are against the dense step's picture, decoded whole.",
        "",
        *table(["latents", "attention", "time", "peak of memory", "error"], cells),
    ]


def share(row: dict[str, Any]) -> str:
    """How many of a cache's steps ran all blocks."""
    return f" ({row['computed']:.0%})" if "computed" in row else ""
