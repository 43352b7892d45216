"""The page of `benchmarks.large`: a transformer of 14 B, dense and split, and its calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.pages import load, origin, table


def page() -> Iterator[str]:
    """Steps, calibration by phase, and what plans chose, for each size."""
    result = load("large")
    model, rows = result["model"], result["rows"]
    yield origin(result)
    yield f"{model['layers']} layers of {model['heads']} heads of {model['head_dim']} channels."
    yield "Weights are random, so no quality is shown: errors are of the model's whole output."
    yield ""
    yield "## A step"
    yield ""
    yield "*Compiled* is with the blocks compiled. *First call* is what it takes more, with"
    yield "compiling. *L2* is against the dense model that is not compiled."
    yield ""
    head = ["tokens", "dense", "dense, compiled", "split, compiled", "", "L2", "first call", "GiB"]
    yield from table(head, [_step(row) for row in rows.values() if "dense" in row])
    if both := [row for row in rows.values() if "eager" in row.get("split", {})]:
        yield ""
        yield "Split with blocks compiled, and without a compiler; *attention* is all of a step's,"
        yield "that between video and text too, by a profile of one step."
        yield ""
        head = ["tokens", "compiled", "of it attention", "eager", "of it attention", "L2 eager"]
        yield from table(head, [_routes(row) for row in both])
    yield ""
    yield "## Calibration"
    yield ""
    yield f"For a density of {100 * result['density']:.3g} %, kernels compiled on the way."
    yield "*Phases* are what is measured, in order; *the rest* is tracing the model and timing it"
    yield "whole. *GiB* is the peak; a dense step that is not compiled needs the second number."
    for row in rows.values():
        if "seconds" in row.get("calibration", {}):
            yield ""
            yield from _calibration(row)


def _step(row: dict[str, Any]) -> list[str]:
    dense, split = row["dense"], row.get("split")
    eager, compiled = dense["eager"], dense["compiled"]
    found = [
        f"{row['tokens']:,}",
        f"{eager['step_s']:.2f} s",
        f"{compiled['step_s']:.2f} s",
    ]
    if split is None:
        return [*found, "", "", "", "", ""]
    return [
        *found,
        f"{split['step_s']:.2f} s",
        f"{compiled['step_s'] / split['step_s']:.2f}x",
        f"{split['error']:.4f}",
        f"{split['compile_s']:.0f} s",
        f"{split['peak_gib']:.0f}",
    ]


def _routes(row: dict[str, Any]) -> list[str]:
    compiled, eager = row["split"], row["split"]["eager"]
    return [
        f"{row['tokens']:,}",
        f"{compiled['step_s']:.2f} s",
        f"{compiled['attention_s']:.3f} s",
        f"{eager['step_s']:.2f} s",
        f"{eager['attention_s']:.3f} s",
        f"{eager['error']:.4f}",
    ]


def _calibration(row: dict[str, Any]) -> Iterator[str]:
    found = row["calibration"]
    phases = dict(found["phases"])
    phases["the rest"] = found["seconds"] - sum(phases.values())
    eager = row["dense"]["eager"]["peak_gib"]
    chunks = ", ".join(
        f"{count} {'by the grid' if size == '0' else f'in chunks of {int(size):,}'}"
        for size, count in found["heads_by_chunk"].items()
    )
    yield f"{row['tokens']:,} tokens, {found['samples']} samples: {found['seconds']:.0f} s."
    yield f"Density {100 * found['density']:.1f} %, {found['split']} attentions split."
    yield f"Key heads: {chunks}. {found['peak_gib']:.0f} GiB, {eager:.0f} GiB."
    yield ""
    yield from table(["phase", "s"], [[name, f"{s:.0f}"] for name, s in phases.items()])
    if found["notes"]:
        yield ""
        yield f"The plan says: {'; '.join(found['notes'])}."
