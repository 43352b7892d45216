"""Orders of tokens in the report: which one each head has, and what ordering by content buys it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from freqopt.config import ALL
from freqopt.plan.curves import chunks_by_head, error_at
from freqopt.plan.plan import Plan
from freqopt.reporting.maps import label_map, map_height, unknown
from freqopt.reporting.style import GRID, INK, MAX_MARKS, Array, styled, thin

SHADES = ("#b9c3cd", "#9cc3e4", "#4b93c9", "#0b62a4", "#083d66", "#3b2a66")
"""Of the grid's order, and of chunks that are ordered by content from small to large."""


class Bought(NamedTuple):
    """Errors of a head at its density, over all timesteps, in the orders that were measured.

    chunk: that it has, 0 for the grid's order. grid: error in the grid's order. content: by chunk.
    None where a curve does not reach that density.
    """

    chunk: int
    grid: float | None
    content: dict[int, float | None]

    @property
    def ratio(self) -> float | None:
        """Error by content over that by the grid: in its own order by content, else in the best."""
        known = {chunk: error for chunk, error in self.content.items() if error is not None}
        error = known.get(self.chunk) if self.chunk else min(known.values(), default=None)
        return None if error is None or not self.grid else error / self.grid


def bought(plan: Plan) -> dict[str, list[Bought]]:
    """What orders buy the heads of each split site where several were measured, by its name."""
    found = {}
    for name, evidence in plan.evidence.sites.items():
        site = plan.sites[name]
        if site.decision == "dense" or not site.density or not evidence.content:
            continue
        found[name] = [
            Bought(
                chunk,
                error_at(evidence.curve, density, head),
                {each.chunk: error_at(each, density, head) for each in evidence.content},
            )
            for head, (chunk, density) in enumerate(
                zip(chunks_by_head(site), site.density, strict=True)
            )
        ]
    return found


def has_orders(plan: Plan) -> bool:
    """Whether orders by content were measured, or are taken."""
    return any(any(site.chunks) for site in plan.sites.values()) or any(
        evidence.content for evidence in plan.evidence.sites.values()
    )


def chunk_words(chunk: int) -> str:
    """An order in words."""
    if not chunk:
        return "grid"
    return "content, all tokens" if chunk == ALL else f"content, chunks of {chunk:,}"


@styled
def order_maps(plan: Plan) -> Figure:
    """Layer x head: the order of each head, and its error by content over that by the grid."""
    names = thin(list(plan.sites), MAX_MARKS)
    known = bought(plan)
    figure = Figure(figsize=(9.6, map_height(len(names)) + 0.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _orders(left, plan, names)
    ratios = unknown(plan, names)
    for row, name in enumerate(names):
        for head, each in enumerate(known.get(name, [])[: ratios.shape[1]]):
            ratios[row, head] = np.nan if each.ratio is None else each.ratio
    _ratios(figure, right, plan, names, ratios)
    return figure


def _orders(ax: Axes, plan: Plan, names: Sequence[str]) -> None:
    used = sorted({c for name in names for c in plan.sites[name].chunks} | {0})
    values = unknown(plan, names)
    for row, name in enumerate(names):
        site = plan.sites[name]
        if site.decision == "split":
            places = [used.index(chunk) for chunk in chunks_by_head(site)]
            values[row, : site.heads] = places[: values.shape[1]]
    shades = [SHADES[min(place, len(SHADES) - 1)] for place in range(len(used))]
    _blank(ax, values)
    ax.imshow(
        values,
        aspect="auto",
        cmap=ListedColormap(shades),
        vmin=-0.5,
        vmax=len(used) - 0.5,
        interpolation="nearest",
    )
    label_map(ax, names, "Order of each head's tokens")
    handles = [
        Patch(color=shade, label=chunk_words(chunk))
        for chunk, shade in zip(used, shades, strict=True)
    ]
    if any(plan.sites[name].decision == "dense" for name in names):
        handles.append(Patch(facecolor="white", edgecolor=GRID, hatch="////", label="dense"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2)


def _ratios(figure: Figure, ax: Axes, plan: Plan, names: Sequence[str], values: Array) -> None:
    """The map of ratios; heads that take an order by content have a dot."""
    _blank(ax, values)
    seen = values[np.isfinite(values) & (values > 0.0)]
    far = float(np.exp(np.abs(np.log(seen)).max())) if seen.size else 1.0
    far = min(max(far, 1.25), 8.0)
    norm = Normalize(-np.log2(far), np.log2(far))
    shown_values = np.log2(np.clip(values, 1e-9, None))
    image = ax.imshow(
        shown_values, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest"
    )
    label_map(ax, names, "Error by content over error by grid", labels=False)
    ticks = np.linspace(-np.log2(far), np.log2(far), 5)
    bar = figure.colorbar(image, ax=ax, shrink=0.9, ticks=ticks)
    bar.ax.set_yticklabels([f"{2.0**tick:.2f}" for tick in ticks])
    bar.set_label("at equal density")
    dots = [
        (head, row)
        for row, name in enumerate(names)
        if plan.sites[name].decision == "split"
        for head, chunk in enumerate(chunks_by_head(plan.sites[name])[: values.shape[1]])
        if chunk
    ]
    if dots:
        ax.scatter([x for x, _ in dots], [y for _, y in dots], s=9, color=INK, lw=0)


def _blank(ax: Axes, values: Array) -> None:
    """Hatching behind a map, which shows where there are no values."""
    rows, columns = values.shape
    ax.set_facecolor("white")
    ax.fill_between(
        [-0.5, columns - 0.5],
        -0.5,
        rows - 0.5,
        facecolor="white",
        edgecolor=GRID,
        hatch="////",
        lw=0,
        zorder=0,
    )
