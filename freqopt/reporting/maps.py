"""Heat maps of the report: layer x head, over all timesteps and per timestep bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from freqopt.plan.curves import planned_points
from freqopt.plan.plan import Plan
from freqopt.reporting.style import MAX_MARKS, Array, short, styled, thin
from freqopt.shown import shown

MAX_BUCKETS = 12
"""Timestep buckets that have maps of their own; more are thinned evenly."""


@styled
def heat_maps(plan: Plan) -> Figure:
    """Layer x head maps of density and error, as verified and fitted over all timesteps."""
    names = thin([name for name in plan.sites if name in plan.evidence.sites], MAX_MARKS)
    density = _matrix(plan, names, "density", dense=1.0)
    error = _matrix(plan, names, "error", dense=0.0)
    figure = Figure(figsize=(9.6, map_height(len(names))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _map(figure, left, 100 * density, "density (%)", "Blues", names, "Density")
    _map(figure, right, error, "relative L2 error", "Oranges", names, "Error", labels=False)
    return figure


@styled
def timestep_maps(plan: Plan) -> Figure | None:
    """The same maps per timestep bucket at its own budgets; None without buckets."""
    names = thin([name for name, e in plan.evidence.sites.items() if e.buckets], MAX_MARKS)
    if not names:
        return None
    every = sorted({b.bucket for name in names for b in plan.evidence.sites[name].buckets})
    buckets = thin(every, MAX_BUCKETS)
    kinds = (
        ("density", 100.0, "density (%)", "Blues"),
        ("error", 1.0, "relative L2 error", "Oranges"),
    )
    figure = Figure(
        figsize=(2.3 * len(buckets) + 1.6, 2 * map_height(len(names))), layout="constrained"
    )
    axes = figure.subplots(2, len(buckets), squeeze=False, sharex=True, sharey=True)
    for row, (kind, factor, label, colours) in zip(axes, kinds, strict=True):
        maps = [factor * _bucket_matrix(plan, names, bucket, kind) for bucket in buckets]
        top = _highest(maps)
        for i, (ax, values, bucket) in enumerate(zip(row, maps, buckets, strict=True)):
            title = bucket_label(plan, bucket)
            last = i == len(buckets) - 1
            _map(
                figure,
                ax,
                values,
                label,
                colours,
                names,
                title,
                labels=i == 0,
                bar=last,
                top=top,
            )
    return figure


def bucket_label(plan: Plan, bucket: int) -> str:
    """Range of a timestep bucket in the model's own units."""
    edges, name = plan.timestep_edges, shown(plan.timestep_name or "timestep")
    name = name.replace("$", r"\$")
    if bucket == 0:
        return f"{name} < {edges[0]:.3g}"
    if bucket == len(edges):
        return f"{name} > {edges[-1]:.3g}"
    return f"{edges[bucket - 1]:.3g} to {edges[bucket]:.3g}"


def _matrix(plan: Plan, names: Sequence[str], kind: str, dense: float) -> Array:
    matrix = unknown(plan, names)
    for row, name in enumerate(names):
        site = plan.sites[name]
        known = getattr(site, kind)[: matrix.shape[1]] if site.decision == "split" else dense
        if known != []:
            matrix[row, : site.heads] = known
    return matrix


def unknown(plan: Plan, names: Sequence[str]) -> Array:
    """A row for each site, a column for each head, as far as they are shown."""
    heads = max(plan.sites[name].heads for name in names)
    return np.full((len(names), min(heads, MAX_MARKS)), np.nan)


def _bucket_matrix(plan: Plan, names: Sequence[str], bucket: int, kind: str) -> Array:
    matrix = unknown(plan, names)
    for row, name in enumerate(names):
        evidence = plan.evidence.sites[name]
        if all(each.bucket != bucket for each in evidence.buckets):
            continue
        points = planned_points(plan.sites[name], evidence, bucket, matrix.shape[1])
        for head, point in enumerate(points):
            if point is not None:
                matrix[row, head] = getattr(point, kind)
    return matrix


def _last_row(ax: Axes) -> bool:
    """Whether a panel is in the last row of its figure, where labels go."""
    place = ax.get_subplotspec()
    return place is None or place.is_last_row()


def _highest(maps: Sequence[Array]) -> float:
    """The largest value of some maps, above 0; unknown values do not count."""
    known = [float(values[np.isfinite(values)].max(initial=0.0)) for values in maps]
    return max(*known, 1e-9)


def label_map(ax: Axes, names: Sequence[str], title: str, *, labels: bool = True) -> None:
    """Names of sites, numbers of heads and a title around a map of them."""
    step = max(1, math.ceil(len(names) / 24))
    ax.set_yticks(range(0, len(names), step), [short(names[i]) for i in range(0, len(names), step)])
    ax.tick_params(labelleft=labels)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="head" if _last_row(ax) else "", title=title)
    ax.grid(False)


def map_height(rows: int) -> float:
    """Inches of a map of so many sites."""
    return min(max(1.6 + 0.22 * rows, 2.4), 9.0)


def _map(
    figure: Figure,
    ax: Axes,
    values: Array,
    label: str,
    colours: str,
    names: Sequence[str],
    title: str,
    *,
    labels: bool = True,
    bar: bool = True,
    top: float | None = None,
) -> None:
    image = ax.imshow(
        values,
        aspect="auto",
        cmap=colours,
        interpolation="nearest",
        vmin=0,
        vmax=top or _highest([values]),
    )
    label_map(ax, names, title, labels=labels)
    if bar:
        figure.colorbar(image, ax=ax, label=label, shrink=0.9)
