"""Curves of the report, each a function from a plan to a matplotlib Figure.

One palette and one style for all, dark on white, axes labelled with units, so that a figure can go
into a slide as it is. No pyplot: nothing global is touched and no display is needed.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from freqopt.calibration.evidence import choices_of_plan
from freqopt.calibration.search.allocate import Allocation, solve
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import cost_model
from freqopt.calibration.search.video import decibels_of
from freqopt.plan.plan import Plan
from freqopt.shown import shown

Array = NDArray[np.float64]

INK, SOFT, GRID = "#1b2430", "#5b6675", "#e3e8ee"
BLUE, ORANGE, GREEN, GREY = "#0b62a4", "#d9601a", "#2a9d74", "#a9b4c0"
BAND_COLOURS = {"low band (means of 64)": "#dbe9f6", "high band (exact)": "#fcebdd"}

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.labelsize": 10.5,
    "svg.hashsalt": "freqopt",
}

MAX_PANELS = 24
"""Panels of one figure of small multiples; more sites than that are thinned evenly."""

MAX_LINES, MAX_MARKS = 64, 256
"""Lines of a panel, and marks, rows or bars of a figure: what is more is thinned evenly too, as a
small file can hold enough to draw for hours."""


LEAST_POWER = 1e-9
"""Bins with less of a spectrum's power hold no frequency of the lattice, or its constant alone."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under STYLE, which matplotlib reads as artists are made."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def figure_html(figure: Figure, caption: str = "", alt: str = "", *, photo: bool = False) -> str:
    """A figure as self-contained HTML: an inline SVG image, with a caption.

    photo: it shows pictures, whose colours stay as they are where the reader's screen is dark.
    """
    from html import escape

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            metadata={"Date": None},
            dpi=160,
            transparent=not photo,
        )
    data = base64.b64encode(buffer.getvalue()).decode()
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = "photo" if photo else "chart"
    source = f"data:image/svg+xml;base64,{data}"
    image = f'<img class="{kind}" alt="{escape(alt or caption)}" src="{source}">'
    return f'<figure><div class="scroll">{image}</div>{under}</figure>'


@styled
def frontier(plan: Plan) -> Figure:
    """Predicted output error against density, calibrated and uniform, and the trials."""
    figure, ax = _single(7.4, 4.2)
    sites, cost = choices_of_plan(plan), cost_model(plan.evidence.timings)
    lowest = max(solve(sites, math.inf, cost).error, 1e-6)
    targets = np.geomspace(min(lowest, plan.target_error) / 20, max(lowest, 1e-5), 60)
    points = sorted({_point(solve(sites, float(t), cost)) for t in targets})
    trials = thin(plan.evidence.trials, MAX_MARKS) if plan.target_psnr is None else []
    ax.plot(
        *zip(*_uniform(sites), strict=True), color=GREY, lw=2, label="one threshold for all heads"
    )
    ax.plot(
        *zip(*points, strict=True), color=BLUE, lw=2.4, label="per head and timestep, errors alone"
    )
    if trials:
        ax.scatter(
            [t.mean_density for t in trials],
            [t.measured_error for t in trials],
            s=26,
            color=INK,
            zorder=3,
            label="verified on held-out samples",
        )
    ax.scatter(
        [plan.mean_density], [plan.measured_error], s=110, color=ORANGE, zorder=4, label="this plan"
    )
    if plan.target_density is not None:
        ax.axvline(plan.target_density, color=ORANGE, lw=1.2, ls=(0, (4, 3)))
    elif plan.target_psnr is None:
        ax.axhline(plan.target_error, color=ORANGE, lw=1.2, ls=(0, (4, 3)))
        ax.annotate(
            "target",
            (1.0, plan.target_error),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=ORANGE,
            fontsize=9.5,
        )
    ax.set(
        xlabel="mean density (share of pairs attended exactly)",
        ylabel="relative L2 error of the output",
        xscale="log",
        yscale="log",
    )
    ax.set_ylim(bottom=plan.target_error / 30)
    percent_axis(ax)
    ax.legend(loc="lower left")
    return figure


@styled
def verification(plan: Plan) -> Figure:
    """What every verification trial was predicted and found to be, with the accepted band."""
    trials = thin(plan.evidence.trials, MAX_MARKS)
    figure, ax = _single(7.4, 3.2)
    at = np.arange(1, len(trials) + 1)
    ax.set(xlabel="trial", xticks=thin(at.tolist()), xlim=(0.5, len(trials) + 0.5))
    if plan.target_psnr is not None:
        _band(ax, plan.target_psnr, plan.target_psnr, plan.target_psnr + 1.94)
        found = [min(decibels_of(t.measured_error), 100.0) for t in trials]
        ax.plot(at, found, "o-", color=BLUE, label="measured")
        ax.set_ylabel("PSNR of the video (dB)")
        return figure
    if plan.target_density is not None:
        _band(ax, 100 * plan.target_density, 95 * plan.target_density, 100 * plan.target_density)
        ax.plot(at, [100 * t.mean_density for t in trials], "o-", color=BLUE, label="measured")
        ax.set_ylabel("mean density (%)")
        return figure
    _band(ax, plan.target_error, 0.8 * plan.target_error, plan.target_error)
    ax.plot(at, [t.predicted_error for t in trials], "o--", color=GREY, label="predicted")
    ax.plot(at, [t.measured_error for t in trials], "o-", color=BLUE, label="measured")
    for i, trial in zip(at, trials, strict=True):
        errors = thin(trial.sample_errors, MAX_MARKS)
        ax.scatter([i] * len(errors), errors, s=10, color=BLUE, alpha=0.4)
    ax.set_ylabel("relative L2 error")
    ax.set_ylim(bottom=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _band(ax: Axes, target: float, low: float, high: float) -> None:
    """What verification accepts, and the target."""
    ax.axhspan(low, high, color="#fcebdd", lw=0)
    ax.axhline(target, color=ORANGE, lw=1.2, ls=(0, (4, 3)))


@styled
def error_cost_curves(plan: Plan) -> Figure:
    """Error of each head against its density, one panel per site, with the chosen points."""
    names = thin(list(plan.evidence.sites))
    figure, axes = _panels(len(names), sharex=True, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        site, evidence = plan.sites[name], plan.evidence.sites[name]
        heads = thin(range(site.heads), MAX_LINES)
        density = np.array(evidence.curve.density)[:, heads]
        error = np.array(evidence.curve.error)[:, heads]
        ax.plot(density, np.maximum(error, 1e-4), color=BLUE, lw=1.0, alpha=0.45)
        if site.decision == "split":
            chosen = [max(site.error[h], 1e-4) for h in heads]
            ax.scatter([site.density[h] for h in heads], chosen, s=16, color=ORANGE, zorder=3)
        else:
            ax.text(0.5, 0.9, "dense", transform=ax.transAxes, color=ORANGE, ha="center")
        ax.set(xscale="log", yscale="log", title=short(name))
        percent_axis(ax, marks=(1.0,))
    figure.supxlabel("density (share of pairs attended exactly)")
    figure.supylabel("relative L2 error of the head")
    _legend(figure, {"measured": BLUE, "chosen": ORANGE})
    return figure


@styled
def spectra(plan: Plan) -> Figure | None:
    """Power of the keys per head against spatial frequency with the bands drawn in."""
    names = thin([n for n, e in plan.evidence.sites.items() if e.spectrum is not None], 12)
    if not names:
        return None
    figure, axes = _panels(len(names), sharex=True, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        spectrum = plan.evidence.sites[name].spectrum
        assert spectrum is not None
        edges = np.array(spectrum.edges)
        centres = edges - 0.5 * edges[0]
        ends = (0.0, spectrum.cutoff, edges[-1])
        for start, end, colour in zip(ends, ends[1:], BAND_COLOURS.values(), strict=False):
            ax.axvspan(start, end, color=colour, lw=0)
        for row in thin(spectrum.power, MAX_LINES):
            values = np.array(row)
            kept = values > LEAST_POWER
            ax.plot(centres[kept], values[kept], color=BLUE, lw=1.0, alpha=0.55)
        share = 100 * float(np.mean(spectrum.low))
        ax.set(yscale="log", title=f"{short(name)}: {share:.0f} % low", xlim=(0, edges[-1]))
        ax.grid(False)
    axes[0].set_ylim(bottom=max(axes[0].get_ylim()[0], 1e-7))
    figure.supxlabel("frequency on the token lattice (cycles per token)")
    figure.supylabel("share of the keys' power per bin")
    _legend(figure, BAND_COLOURS, patches=True)
    return figure


@styled
def probe_scatter(plan: Plan) -> tuple[Figure, float, float] | None:
    """Error reported by the op's probes against the true one; with rank correlation, mean ratio."""
    pairs = [
        (true, probe)
        for evidence in plan.evidence.sites.values()
        for true_row, probe_row in zip(
            evidence.curve.error, evidence.curve.probe_error, strict=True
        )
        for true, probe in zip(true_row, probe_row, strict=True)
        if true > 1e-4 and probe > 1e-4
    ]
    if len(pairs) < 3:
        return None
    values = np.array(thin(pairs, MAX_MARKS**2))
    figure, ax = _single(4.8, 4.4)
    ax.scatter(values[:, 0], values[:, 1], s=7, color=BLUE, alpha=0.35, lw=0, rasterized=True)
    ends = np.array([values.min(), values.max()])
    ax.plot(ends, ends, color=ORANGE, lw=1.2, ls=(0, (4, 3)))
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="true relative L2 error",
        ylabel="error reported by the probes",
    )
    ranks = np.argsort(np.argsort(values, axis=0), axis=0)
    correlation = float(np.asarray(np.corrcoef(ranks.T))[0, 1])
    return figure, correlation, float((values[:, 1] / values[:, 0]).mean())


@styled
def gains(plan: Plan) -> Figure | None:
    """How much of each site's error reaches the model's output; a point per head and bucket.

    Where marginals are known, a second one: the gain that the head's error has among all others.
    """
    named = thin([(n, site) for n, site in plan.sites.items() if site.gains], MAX_MARKS)
    known = [(short(name), [gain for row in site.gains for gain in row]) for name, site in named]
    if len(known) < 2:
        return None
    figure, ax = _single(7.4, 2.8)
    at = np.arange(len(known))
    ax.bar(at, [100 * float(np.mean(values)) for _, values in known], color="#c9dcee", width=0.7)
    for i, (_, values) in enumerate(known):
        some = thin(values, MAX_MARKS)
        ax.scatter([i] * len(some), 100 * np.array(some), s=12, color=BLUE, zorder=3)
    for i, (_, site) in enumerate(named):
        gains, ratios = (np.array(rows).ravel() for rows in (site.gains, site.marginals))
        among = 100 * gains[: len(ratios)] * np.sqrt(ratios.clip(min=0.0))
        among = among[:: max(1, len(among) // MAX_MARKS)]
        ax.scatter([i + 0.2] * len(among), among, s=12, color=ORANGE, zorder=3)
    shown = at[:: max(1, math.ceil(len(at) / 16))]
    ax.set_xticks(shown, [known[i][0] for i in shown], rotation=35, ha="right")
    ax.set_ylabel("% of the site's error\nseen in the output")
    ax.grid(axis="x", visible=False)
    return figure


def thin(names: Sequence[T], most: int = MAX_PANELS) -> list[T]:
    """At most `most` of a list, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def short(name: str) -> str:
    """A site's name cut to what fits a panel, as text and not as a formula."""
    cut = shown(name if len(name) <= 24 else "..." + name[-21:])
    return cut.replace("$", r"\$")


def _point(allocation: Allocation) -> tuple[float, float]:
    return allocation.density, allocation.error


def _uniform(sites: Sequence[SiteChoices]) -> list[tuple[float, float]]:
    """(density, error) with one threshold for every head of every site, but for 0."""
    weights = np.array([site.heads * site.tokens**2 * site.head_dim for site in sites], float)
    density = sum(
        w / s.heads * (s.weight[:, None] * s.density[:, 1:]).sum(0)
        for w, s in zip(weights, sites, strict=True)
    )
    error = sum(site.error[:, 1:].sum(0) for site in sites)
    return list(zip(np.asarray(density) / weights.sum(), np.sqrt(error), strict=True))


def _single(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _panels(count: int, **shared: Any) -> tuple[Figure, list[Axes]]:
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(2.5 * max(columns, 3) + 0.6, 2.1 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    axes: list[Axes] = list(grid.flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, colours: dict[str, str], *, patches: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=colour, label=label)
        if patches
        else Line2D([], [], color=colour, label=label, lw=3)
        for label, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)


def percent_axis(ax: Axes, marks: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Label a logarithmic x axis of shares in per cent."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    if high < 8 * low and len(marks) > 1:  # few of the usual marks are in sight
        marks = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
    ax.xaxis.set_major_locator(LogLocator(subs=marks, numticks=12))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
