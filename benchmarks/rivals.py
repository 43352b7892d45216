"""Error against time of the op and of what else is installed: `python -m benchmarks.rivals`.

Same Q, K and V for all: every head of the zoo's trained model in the middle of denoising, stacked.
Time is that of the whole call, with the choice of what to attend where a rival makes one; a rival
that is given the op's route is timed without it, which favours the rival; beside those stands the
time of the op's attention kernel alone, on the same route. Of a rival's two orders
of tokens the one with less error counts at each setting. What is not installed is named with what
brings it, and what fails with its error. With `--only` the rows of all others stay as the file in
the folder has them, each with its commit. `--small` runs it on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import orders, rival_calls
from benchmarks.attention import GRIDS, SMALL, dense_attention, relative_errors
from benchmarks.common import RESULTS, commands_before, environment, timed, write
from benchmarks.rival_calls import Rival, Route, Source
from benchmarks.tensors import Attention, zoo_attention
from freqopt.config import KEY_BLOCK
from freqopt.kernels import reference
from freqopt.models_zoo.video_dit import load_pretrained

DENSITIES = (0.05, 0.10, 0.20)
HALF = 0.5
"""Relative L2 error above which an output is no approximation: such a row has no time."""


def route_at(a: Attention, density: float) -> Route:
    """The op's route in the grid's order at a density, one threshold for all heads."""
    each = orders.shared_orderings(a)[0]
    threshold = orders.threshold_at(each, a, density)
    if a.query.device.type == "cuda":
        from benchmarks.attention import part_times

        times, found = part_times(a, threshold, each)
        share = float(found.counts.double().mean()) / -(-a.query.shape[2] // KEY_BLOCK)
        return Route(share, found.exact_list, found.counts, times["attend"])
    from freqopt.kernels.chunked import split_forward
    from freqopt.kernels.layout import Inputs, Settings, TokenLayout

    inputs = Inputs(
        a.query,
        a.key,
        a.value,
        a.query.new_full((a.query.shape[1],), threshold),
        None,
        TokenLayout(a.grid, 0, 0),
    )
    exact = split_forward(inputs, Settings(a.query.shape[-1] ** -0.5, 0.0, 0)).split.route
    exact = exact == reference.EXACT
    counts = exact.sum(-1).to(torch.int32)
    listed = (~exact).to(torch.int8).sort(stable=True).indices.to(torch.int32)
    return Route(float(exact.double().mean()), listed, counts)


def row_of(rival: Rival, reference_out: Tensor) -> dict[str, Any]:
    """Error and time of a rival; its error message where it does not run."""
    row: dict[str, Any] = {
        "name": rival.name,
        "setting": rival.setting,
        "density": rival.density,
    }
    truth = reference_out if rival.order is None else reference_out[:, :, rival.order]
    try:
        out = rival.run()
        row["l1"], row["l2"] = relative_errors(out, truth)
        if not torch.isfinite(out).all() or row["l2"] > HALF:
            return row | {"failed": f"its output is off by {row['l2']:.3g}: no time"}
        row["ms"] = timed(rival.run, truth.device)
    except Exception as error:  # whatever another package raises: the benchmark goes on
        return row | {"failed": f"{type(error).__name__}: {error}"[:300]}
    return row


def better_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that differ in the order of tokens alone, the one with less error."""
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["name"], row["setting"].split(", ")[0]
        if key not in kept or row.get("l2", torch.inf) < kept[key].get("l2", torch.inf):
            kept[key] = row
    return list(kept.values())


def ours(a: Attention, densities: Sequence[float], chosen: orders.Ordering) -> Iterator[Rival]:
    """The op: in the grid's order, and in the better of that and content for each head."""
    for each in (orders.shared_orderings(a)[0], chosen):
        for density in densities:
            threshold = orders.threshold_at(each, a, density)
            reached = float(each.call(a, threshold=threshold).density.mean())

            def run(each: orders.Ordering = each, threshold: float = threshold) -> Tensor:
                return each.call(a, threshold=threshold).out

            name = f"freqopt, {each.name}"
            yield Rival(name, reached, run, None, f"density {density:g}")


def rows_of(make: Callable[[], Iterator[Rival]], truth: Tensor) -> list[dict[str, Any]]:
    """Rows of all rivals that a function makes; where that fails, one that says so."""
    rows = []
    try:
        for rival in make():
            rows.append(row_of(rival, truth))
            say(rows[-1])
    except Exception as error:
        rows.append({"name": "", "setting": "", "failed": f"{type(error).__name__}: {error}"[:300]})
    return rows


def say(row: dict[str, Any]) -> None:
    """A row on the terminal."""
    density = "   ?  " if row.get("density") is None else f"{row['density']:6.3f}"
    said = row.get("failed") or f"L1 {row['l1']:.4f}  L2 {row['l2']:.4f}  {row['ms']:8.3f} ms"
    print(f"{row['name']:34} {density}  {row['setting']:30} {said}", flush=True)


def measure(
    a: Attention, densities: Sequence[float], chosen: orders.Ordering, sources: Sequence[Source]
) -> dict[str, Any]:
    """All rows of one problem, and what of the sources failed or is not here."""
    truth = dense_attention(a)
    routes = [route_at(a, density) for density in densities]
    rows, missing = rows_of(lambda: ours(a, densities, chosen), truth), []
    for source in sources:
        why = rival_calls.importable(source.module)
        if why is not None:
            print(f"{source.name}: not here ({source.install}): {why}", flush=True)
            missing.append({"name": source.name, "install": source.install, "why": why})
            continue
        found = rows_of(lambda source=source: source.make(a, routes), truth)
        rows += better_order([row | {"name": row["name"] or source.name} for row in found])
    return {
        "tokens": a.query.shape[2],
        "grid": a.grid,
        "heads": a.query.shape[1],
        "head_dim": a.query.shape[3],
        "dtype": str(a.query.dtype),
        "own_kernel": [
            {"setting": route.setting, "ms": route.own_ms}
            for route in routes
            if route.own_ms is not None
        ],
        "rows": [row for row in rows if "failed" not in row],
        "failed": [row for row in rows if "failed" in row],
        "missing": missing,
    }


def with_earlier(result: dict[str, Any], earlier: dict[str, Any], only: Sequence[str]) -> None:
    """Add an earlier result's rows of rivals that were not asked for, where problems are the same.

    only: sources that were asked for.
    """
    where, commit = result["environment"], earlier["environment"]["commit"]
    where["before"] = commands_before(earlier, where)
    asked = ("tokens", "grid", "heads", "head_dim", "dtype")
    for problem in result["problems"]:
        new = {row["name"] for row in (*problem["rows"], *problem["failed"])} | set(only)
        for old in earlier["problems"]:
            if any(list_of(old[name]) != list_of(problem[name]) for name in asked):
                continue
            for part in ("rows", "failed"):
                problem[part] += [
                    {"commit": commit, **row} for row in old[part] if row["name"] not in new
                ]
            problem["missing"] += [each for each in old["missing"] if each["name"] not in only]


def list_of(x: Any) -> Any:
    """What a value is when it comes back from a file."""
    return list(x) if isinstance(x, tuple) else x


def plot(result: dict[str, Any], path: Path) -> None:
    """Error against time, both logarithmic: a line a rival, ours thick; dense at the right."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    problems = result["problems"]
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    names = list(dict.fromkeys(row["name"] for p in problems for row in p["rows"]))
    figure = Figure(figsize=(6.4 * len(problems), 4.6), layout="constrained")
    for ax, problem in zip(
        figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True
    ):
        for index, name in enumerate(names):
            own = sorted(
                (row["ms"], max(row["l2"], 1e-4)) for row in problem["rows"] if row["name"] == name
            )
            if own:
                mine = name.startswith("freqopt")
                ax.plot(
                    *zip(*own, strict=True),
                    "o-" if mine else "s--",
                    label=name,
                    markersize=5,
                    color=colours[index % len(colours)],
                    linewidth=2.4 if mine else 1.2,
                )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="time of the call, ms",
            ylabel="relative L2 error, mean over heads",
            title=f"{problem['heads']} heads x {problem['tokens']:,} tokens",
        )
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{result['environment']['device']}: lower left is better", fontsize=10)
    figure.savefig(path, dpi=150)


def problem_of(
    grid: tuple[int, int, int], densities: Sequence[float], device: str, sources: Sequence[Source]
) -> dict[str, Any]:
    """One grid; the order of each head is chosen on other tensors."""
    from benchmarks.attention import CHOOSE_AT, CHOOSE_ON

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_pretrained(device=device, dtype=dtype)
    other = zoo_attention(grid, model=model, **CHOOSE_ON)
    chosen = orders.chosen_per_head(other, dense_attention(other), CHOOSE_AT)
    del other
    a = zoo_attention(grid, model=model)
    print(f"{a.query.shape[1]} heads x {a.query.shape[2]:,} tokens, {a.query.dtype}", flush=True)
    return measure(a, densities, chosen, sources)


def main(arguments: list[str] | None = None) -> None:
    """Measure all problems; writes rivals.json and rivals.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    names = [source.name for source in rival_calls.SOURCES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--small", action="store_true", help=f"a grid of {SMALL} on a CPU instead of the sizes"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.small and given.out is None:
        parser.error("--small needs --out: its figures are no results of the benchmark")
    sources = [source for source in rival_calls.SOURCES if source.name in given.only]
    grids = [SMALL] if given.small else [GRIDS[size] for size in given.sizes]
    device = "cpu" if given.small else "cuda"
    with torch.no_grad():
        problems = [problem_of(grid, given.densities, device, sources) for grid in grids]
    result = {"environment": environment(), "problems": problems}
    path = (given.out or RESULTS) / "rivals.json"
    if set(given.only) != set(names) and path.exists():
        with_earlier(result, json.loads(path.read_text()), given.only)
    path = write("rivals", result, given.out)
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
