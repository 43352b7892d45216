"""Curves of the report that are measured at single heads: errors, spectra, probes and gains."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from freqopt.plan.plan import Plan
from freqopt.reporting.style import (
    BAND_COLOURS,
    BLUE,
    MAX_LINES,
    MAX_MARKS,
    ORANGE,
    legend,
    panels,
    percent_axis,
    short,
    single,
    styled,
    thin,
)

LEAST_POWER = 1e-9
"""Bins with less of a spectrum's power hold no frequency of the lattice, or its constant alone."""


@styled
def error_cost_curves(plan: Plan) -> Figure:
    """Error of each head against its density, one panel per site, with the chosen points."""
    names = thin(list(plan.evidence.sites))
    figure, axes = panels(len(names), sharex=True, sharey=True)
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
    legend(figure, {"measured": BLUE, "chosen": ORANGE})
    return figure


@styled
def spectra(plan: Plan) -> Figure | None:
    """Power of the keys per head against spatial frequency with the bands drawn in."""
    names = thin([n for n, e in plan.evidence.sites.items() if e.spectrum is not None], 12)
    if not names:
        return None
    figure, axes = panels(len(names), sharex=True, sharey=True)
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
    legend(figure, BAND_COLOURS, patches=True)
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
    figure, ax = single(4.8, 4.4)
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
    figure, ax = single(7.4, 2.8)
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
