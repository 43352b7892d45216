"""The README's measured table, and the tables of the op, its gradients and the demo.

Every figure comes from a file under benchmarks/results/ that a benchmark or the demo wrote.
`python -m benchmarks.docs` puts them where they belong.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.pages import MOVING, RESULTS, ROOT, load, origin, table

SHOWN = (0.05, 0.1, 0.2)
"""Densities of the README's table; docs/results/attention.md has all that were measured."""

DENSE = 0.99
"""Density from which a row is dense attention, which no order changes."""

NOTHING_YET = (
    "**No GPU figures yet.**\nThe kernels compile for sm_80 and sm_90 and agree with the "
    "definition in Triton's interpreter.\nThey have not been run on a GPU."
)


def in_grid_order(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a problem under the grid's order, the only one of results without a name of it."""
    return [row for row in problem["rows"] if row.get("order", "grid") == "grid"]


def near(density: float) -> bool:
    """Whether a measured density is one of those that the README shows."""
    return any(abs(density - shown) < 0.05 * shown for shown in SHOWN)


def summary(result: dict[str, Any]) -> list[str]:
    """The op at a few densities, beside dense attention: all problems of a result in one table."""
    rows = [
        [
            f"{problem['tokens']:,}",
            f"{100 * row['density']:.0f} %",
            f"{row['l1']:.4f}",
            f"{row['l2']:.4f}",
            f"{row['ms']:.2f} ms",
            f"{min(problem['dense_ms'].values()):.1f} ms",
            f"**{row['speedup']:.2f}x**",
        ]
        for problem in result["problems"]
        for row in in_grid_order(problem)
        if near(row["density"])
    ]
    first = result["problems"][0]
    head = ["tokens", "density", "relative L1", "relative L2", "split", "dense", "against dense"]
    return [
        f"The op alone: {first['heads']} heads of {first['head_dim']}, "
        f"{first['dtype'].removeprefix('torch.')}, tensors of the zoo's video transformer.",
        origin(result),
        "",
        *table(head, rows),
    ]


def attention(result: dict[str, Any]) -> list[str]:
    """The op on every density that was measured, with the share of a call that is not attention."""
    lines: list[str] = []
    for problem in result["problems"]:
        rows = [
            [
                f"{100 * row['density']:.1f} %",
                f"{row['l1']:.4f}",
                f"{row['l2']:.4f}",
                f"{row['ms']:.2f} ms",
                f"{row['graph_ms']:.2f} ms" if "graph_ms" in row else "",
                f"{row['speedup']:.2f}x",
                f"{100 * row['other_share']:.1f} %" if "other_share" in row else "",
            ]
            for row in in_grid_order(problem)
        ]
        head = [
            "density",
            "relative L1",
            "relative L2",
            "whole call",
            "in a CUDA graph",
            "against dense",
            "everything but attention",
        ]
        lines += [
            f"{problem['heads']} heads x {problem['tokens']:,} tokens, head dim "
            f"{problem['head_dim']}, {problem['dtype'].removeprefix('torch.')}.",
            f"Dense attention takes {min(problem['dense_ms'].values()):.1f} ms.",
            "",
            *table(head, rows),
            "",
        ]
        if len(in_grid_order(problem)) < len(problem["rows"]):
            lines += [*by_order(problem["rows"]), ""]
    if "rectangular" in result:
        lines += [*rectangular(result["rectangular"]), ""]
    return lines[:-1]


def rectangular(found: dict[str, Any]) -> list[str]:
    """Queries that are a few of the keys' tokens; see `benchmarks.attention.rectangular`."""
    rows = [
        [
            row["order"],
            f"{100 * row['density']:.1f} %",
            f"{row['l1']:.4f}",
            f"{row['l2']:.4f}",
            f"{row['ms']:.2f} ms",
            f"{row['speedup']:.2f}x",
        ]
        for row in found["rows"]
    ]
    head = ["order", "density", "relative L1", "relative L2", "whole call", "against dense"]
    return [
        f"{found['heads']} heads, {found['queries']:,} queries against {found['keys']:,} keys:",
        f"the first frames of a video. Dense attention takes {found['dense_ms']:.1f} ms.",
        "Each head finds the threshold of the density, and both sides are ordered in every call.",
        "",
        *table(head, rows),
    ]


def by_order(rows: list[dict[str, Any]]) -> list[str]:
    """What every order of the tokens gives and costs, at every density below dense."""
    told = all("by_density_ms" in row for row in rows)
    cells = [
        [
            row["order"],
            f"{100 * row['density']:.1f} %",
            f"{row['l1']:.4f}",
            f"{row['l2']:.4f}",
            f"{row['probe_error']:.4f}",
            f"{row['ms']:.2f} ms",
            *([f"{row['by_density_ms']:.2f} ms"] if told else []),
            f"{row['speedup']:.2f}x",
            f"{100 * row['order_share']:.1f} %",
        ]
        for row in rows
        if row["density"] < DENSE
    ]
    head = [
        "order",
        "density",
        "relative L1",
        "relative L2",
        "by the probes",
        "whole call",
        *(["told the density"] if told else []),
        "against dense",
        "of it the order",
    ]
    return table(head, cells)


def dinov2_errors(result: dict[str, Any], clip: str) -> list[str]:
    """Mean errors over layers and heads on one clip: an order a row, a density a column."""
    rows = [row for row in result["rows"] if row["clip"] == clip]
    wanted = sorted({row["wanted"] for row in rows})
    found = {(row["order"], row["wanted"]): row for row in rows}
    cells = [
        [
            order,
            *(f"{found[order, d][e]:.4f}" for e in ("l2", "l1") for d in wanted),
        ]
        for order in dict.fromkeys(row["order"] for row in rows)
    ]
    head = [f"{name} at {100 * d:.0f} %" for name in ("L2", "L1") for d in wanted]
    return table(["order", *head], cells)


def dinov2_speed(result: dict[str, Any]) -> list[str]:
    """Whole calls at one error."""
    cells = [
        [
            row["order"],
            f"one {row['by']}",
            f"{100 * row['density']:.1f} %",
            f"{row['l2']:.4f}",
            f"{row['ms']:.2f} ms",
            f"{row['dense_ms']:.2f} ms",
            f"**{row['speedup']:.2f}x**",
            f"{100 * row['order_share']:.1f} %",
        ]
        for row in result["speed"]
    ]
    head = [
        "order",
        "budget",
        "density",
        "relative L2",
        "split",
        "dense",
        "against dense",
        "of it the order",
    ]
    return table(head, cells)


def cpu(result: dict[str, Any]) -> list[str]:
    """The op on a CPU."""
    cells = [
        [
            row["order"],
            f"{100 * row['density']:.1f} %",
            f"{row['l1']:.4f}",
            f"{row['l2']:.4f}",
            f"{row['ms']:.0f} ms",
            f"{row['dense_ms']:.0f} ms",
            f"**{row['speedup']:.2f}x**",
            f"{100 * row['order_share']:.1f} %",
        ]
        for row in result["rows"]
    ]
    head = [
        "order",
        "density",
        "relative L1",
        "relative L2",
        "split",
        "dense",
        "against dense",
        "of it the order",
    ]
    return table(head, cells)


def rivals(problem: dict[str, Any]) -> list[str]:
    """Every rival by error and time, ours among them; then what failed and what was not there."""
    cells = [
        [
            row["name"],
            row["setting"],
            "" if row["density"] is None else f"{100 * row['density']:.1f} %",
            f"{row['l1']:.4f}",
            f"{row['l2']:.4f}",
            f"{row['ms']:.2f} ms",
        ]
        for row in sorted(problem["rows"], key=lambda row: float(row["ms"]))
    ]
    lines = table(["", "setting", "density", "relative L1", "relative L2", "call"], cells)
    if problem.get("own_kernel"):
        times = [f"{row['ms']:.2f} ms ({row['setting']})" for row in problem["own_kernel"]]
        lines += [
            "",
            "The op's attention kernel alone, which attends the rest by summaries:",
            ", ".join(times) + ".",
        ]
    for row in problem["failed"]:
        lines += [
            "",
            f"{row['name']} ({row['setting'] or 'no setting'}) failed:",
            f"`{row['failed']}`.",
        ]
    if problem["missing"]:
        named = [f"- {each['name']}: {each['install']}" for each in problem["missing"]]
        lines += ["", "Not installed, and what brings it:", "", *named]
    return lines


USES = {"same_matches": "same matches", "words_changed": "words changed"}
"""What features of others' models are for, and how a column of it is headed."""


def real(result: dict[str, Any]) -> list[str]:
    """Plans on others' models: what their features are good for, beside the noise floor."""
    use = next(name for name in USES if name in result["rows"][0])
    cells = [
        [
            row["clip"],
            _goal(row),
            f"{100 * row['density']:.1f} %" if "density" in row else "",
            f"{row['l2']:.2g}",
            f"{row['cosine']:.5f}",
            f"{100 * row[use]:.1f} %",
            f"{row['ms']:.1f} ms",
            f"{row['dense_ms'] / row['ms']:.2f}x",
        ]
        for row in result["rows"]
    ]
    head = [
        "clip",
        "asked for",
        "density",
        "error of features",
        "cosine",
        USES[use],
        "whole call",
        "against dense",
    ]
    return table(head, cells)


def _goal(row: dict[str, Any]) -> str:
    """What a row's plan was asked for."""
    if row["target"] is not None:
        return f"an error of {row['target']:g}"
    if row.get("wanted") is not None:
        return f"a density of {100 * row['wanted']:.0f} %"
    return "noise floor"


def generations(result: dict[str, Any]) -> list[str]:
    """A row for each clip, method, density and number of dense steps.

    Files of before objects were counted have no columns for them.
    """
    counted = counts_objects(result)
    cells = [
        [
            str(row["seed"]),
            row["method"],
            f"{100 * row['density']:.0f} %" if "density" in row else "",
            str(row.get("dense_steps", "")),
            f"{row['psnr_db']:.1f} dB",
            f"{row['ssim']:.4f}",
            f"{row['ssim_scales']:.4f}",
            *([_of_objects(row, name) for name in OBJECTS] if counted else ()),
        ]
        for row in result["rows"]
    ]
    head = ["clip", "method", "density", "dense steps", "PSNR", "SSIM", "SSIM at scales"]
    return table([*head, *OBJECTS.values()] if counted else head, cells)


def _of_objects(row: dict[str, Any], name: str) -> str:
    """A share of a clip's objects; of none there is no share."""
    return f"{100 * row[name]:.0f} %" if row["objects"] else "has none"


OBJECTS = {"objects_kept": "objects kept", "frames_with_all": "frames with all objects"}
"""What rows of generations say of objects, and the columns' heads."""


def counts_objects(result: dict[str, Any]) -> bool:
    """Whether objects were counted in generations."""
    return all(name in row for row in result["rows"] for name in OBJECTS)


def backward(result: dict[str, Any]) -> list[str]:
    """Forward and backward together, and the backward pass kernel by kernel."""
    l2 = result["gradient_l2"]
    dense = min(result["dense_ms"].values())
    head = [
        "density",
        "gradients' relative L2 (query, key, value)",
        "forward and backward",
        "dense",
        "against dense",
    ]
    row = [
        f"{100 * result['density']:.1f} %",
        f"{l2['query']:.4f}, {l2['key']:.4f}, {l2['value']:.4f}",
        f"{result['ms']:.1f} ms",
        f"{dense:.1f} ms",
        f"{result['speedup']:.2f}x",
    ]
    parts = [[name, f"{ms:.2f}"] for name, ms in result["backward_parts_ms"].items()]
    return [
        f"{result['heads']} heads x {result['tokens']:,} tokens, head dim {result['head_dim']}.",
        "",
        *table(head, [row]),
        "",
        f"The backward pass alone takes {result['backward_ms']:.1f} ms and "
        f"{result['backward_extra_bytes'] / 1e9:.1f} GB beside its inputs:",
        "",
        *table(["part", "ms"], parts),
    ]


def demo(result: dict[str, Any]) -> list[str]:
    """The video sampled from the zoo's DiT, dense and rewritten."""
    settings, made = result["settings"], result["calibration_seconds"]
    grid = " x ".join(str(n) for n in result["grid"])
    head = ["density", "output error", "PSNR to dense", "SSIM", "dense", "split", "calibration"]
    row = [
        f"{100 * result.get('density_here', result['mean_density']):.1f} %",
        f"{result.get('error_here', result['measured_error']):.4f}",
        f"{result['psnr_db']:.1f} dB",
        f"{result['ssim']:.3f}",
        f"{result['dense_seconds']:.1f} s",
        f"{result['split_seconds']:.1f} s",
        "a plan that ships" if made is None else f"{made:.0f} s",
    ]
    return [
        f"`{result['command'].split(' --out')[0]}`:",
        f"{settings['steps']} steps at {grid} = {result['tokens']:,} tokens, {settings['dtype']}.",
        origin(result),
        "",
        *table(head, [row]),
    ]


def film() -> str:
    """The moving picture, and what it shows, in the words of its result file."""
    result = load("demo_cpu")
    if not MOVING.exists():
        return (
            "`make demo` makes a clip twice, exact and with most of its attention approximated, "
            "and\nshows on one page what differs. A laptop without a GPU will do."
        )
    settings, where = result["settings"], result["environment"]
    words = "A clip, exact, rewritten, and the difference"
    return "\n".join(
        [
            f'<img src="{MOVING.relative_to(ROOT)}" width="100%" alt="{words}">',
            "",
            "*A clip made twice by a small model: exact, rewritten, and their difference,*",
            "*eight times as bright.*",
            f"*{result['density_here']:.0%} of attention's pairs are exact; the PSNR is "
            f"{result['psnr_db']:.1f} dB.*",
            f"*On two CPU cores ({where['device']}) {settings['steps']} steps take "
            f"{result['split_seconds']:.0f} s instead of {result['dense_seconds']:.0f} s.*",
        ]
    )


def classes() -> str:
    """How many model classes were tested, and in how many attention is split."""
    result = load("models")
    named = dict.fromkeys(row[0] for row in result["rows"])
    split = {row[0] for row in result["rows"] if not row[1].startswith("0 ")}
    libraries = " and ".join(f"{name} {version}" for name, version in result["libraries"].items())
    return (
        f"**{len(named)} model classes of {libraries} are tested; attention of {len(split)} is "
        "split.**\nAt threshold 0 each gives what the dense model gives "
        "([the list](docs/results/models.md))."
    )


def steps(folder: Path = RESULTS) -> list[str]:
    """Steps of a whole model of 14 B, dense and split, on one GPU and on several."""
    rows = []
    if (folder / "large.json").exists():
        large = load("large", folder)
        for row in large["rows"].values():
            if "split" in row:
                dense, split = row["dense"]["compiled"]["step_s"], row["split"]["step_s"]
                rows.append(_step(row["tokens"], 1, dense, split, row["split"]["error"]))
    for ranks in (2, 4, 8):
        if (folder / f"parallel_{ranks}.json").exists():
            result = load(f"parallel_{ranks}", folder)
            by_name = {row["name"]: row for row in result["rows"]}
            best = by_name.get("balanced, Ulysses")
            if best is None:
                continue
            dense, split = (max(row["ms"]) / 1e3 for row in (by_name["dense, Ulysses"], best))
            rows.append(_step(math.prod(result["grid"]), ranks, dense, split, best["error"]))
    if not rows:
        return []
    return [
        "",
        "A step of a whole model: a transformer of Wan 2.1 14B's size, its blocks compiled,",
        "10 % of its pairs exact. Weights are random, so the error tells of arithmetic alone.",
        "",
        *table(["tokens", "GPUs", "dense", "split", "", "relative L2"], rows),
        "",
        "More of it: [one GPU](docs/results/large.md), [several](docs/results/parallel.md).",
    ]


def _step(tokens: int, gpus: int, dense: float, split: float, error: float) -> list[str]:
    times = f"{dense:.2f} s", f"{split:.2f} s", f"**{dense / split:.2f}x**"
    return [f"{tokens:,}", str(gpus), *times, f"{error:.4f}"]


def measured(folder: Path = RESULTS) -> str:
    """Everything between the README's markers."""
    if not (folder / "attention.json").exists():
        return NOTHING_YET
    return "\n".join([*summary(load("attention", folder)), *steps(folder)])
