"""The page of `benchmarks.parallel`: steps on several GPUs, by rank, and what collectives take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import origin, table

COLOURS = ("#1f6feb", "#d29922")
"""Of a rank's own work, and of its collectives."""

HEAD = [
    "step",
    "slowest rank",
    "fastest rank",
    "against dense",
    "attention",
    "collectives",
    "GiB",
    "L2",
    "of one GPU's",
]


def page(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for every number of ranks."""
    yield "A transformer of Wan's size with random weights, its blocks compiled."
    yield "Densities are set: in every layer the densest head has ten times that of the sparsest."
    yield "*Slowest rank* and *fastest rank* are times of a whole step."
    yield "*Attention* is what its kernels take on the rank where they take longest."
    yield "*Collectives* is the largest share of a rank's step that they take, waiting included."
    yield "*GiB* is the most memory of a rank."
    yield "*L2* is the output's error against dense attention on one GPU, not compiled:"
    yield "that of the dense step is what rounding does."
    yield "*Of one GPU's* is that against the same plan there."
    yield "With all keys on every rank, query tiles and probes are those of its own queries."
    for result in results:
        slowest = {row["name"]: max(row["ms"]) for row in result["rows"]}
        dense = slowest.get("dense, Ulysses")
        yield ""
        tokens = result["grid"][0] * result["grid"][1] * result["grid"][2]
        yield f"## {result['ranks']} GPUs, {tokens:,} tokens"
        yield ""
        yield origin(result)
        yield from _about(result)
        yield ""
        yield from table(
            HEAD,
            [
                [
                    row["name"],
                    f"{max(row['ms']):,.0f} ms",
                    f"{min(row['ms']):,.0f} ms",
                    "" if dense is None else f"{dense / max(row['ms']):.2f}x",
                    _attention(row),
                    f"{max(row['collectives']):.0%}",
                    f"{max(row['gib']):.0f}" if "gib" in row else "",
                    "" if row["error"] is None else f"{row['error']:.4f}",
                    "" if row["error_of_one_gpu"] is None else f"{row['error_of_one_gpu']:.1e}",
                ]
                for row in result["rows"]
            ],
        )


def _attention(row: dict[str, Any]) -> str:
    """Of the rank where attention takes longest; empty where that was not measured."""
    if "attention" not in row:
        return ""
    spent = [ms * share for ms, share in zip(row["ms"], row["attention"], strict=True)]
    return f"{max(spent):,.0f} ms"


def _about(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{result['layers']} layers of {result['heads']} heads, "
        f"mean density {100 * result['density']:.3g} %."
    )
    if result["imbalance"]:
        before, after = (100 * (result["imbalance"][n] - 1) for n in ("before", "after"))
        yield (
            f"By the cost model the fullest rank has {before:.1f} % more work than the mean, "
            f"once balanced {after:.1f} %."
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of every step, one for each rank, and the part of them that collectives take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, ranks = result["rows"], result["ranks"]
    figure, ax = plt.subplots(figsize=(1.5 + 1.9 * len(rows), 3.6))
    width = 0.8 / ranks
    for at, row in enumerate(rows):
        for rank, (ms, share) in enumerate(zip(row["ms"], row["collectives"], strict=True)):
            place = at + (rank + 0.5) * width - 0.4
            parts = (1.0 - share) * ms, share * ms
            for bottom, height, colour in zip((0.0, parts[0]), parts, COLOURS, strict=True):
                ax.bar(place, height, 0.9 * width, bottom=bottom, color=colour)
        ax.annotate(
            f"{max(row['ms']):,.0f} ms",
            (at, max(row["ms"])),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(range(len(rows)), [row["name"].replace(", ", "\n") for row in rows], fontsize=8)
    ax.set(ylabel="a step, ms", title=f"{ranks} x {result['environment']['device']}")
    ax.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS],
        ["a rank's own work", "collectives, waiting included"],
        frameon=False,
        fontsize=8,
    )
    ax.set_ylim(0, 1.15 * max(max(row["ms"]) for row in rows))
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
