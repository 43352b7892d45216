"""How figures of the report look: one palette and one style for all, and what they share.

Dark on white, axes labelled with units, so that a figure can go into a slide as it is. No pyplot:
nothing global is touched and no display is needed.
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
from matplotlib.text import Text
from numpy.typing import NDArray

from freqopt.shown import shown

Array = NDArray[np.float64]

INK, SOFT, GRID = "#1b2430", "#5b6675", "#e3e8ee"
BLUE, ORANGE, GREEN, GREY = "#0b62a4", "#d9601a", "#2a9d74", "#a9b4c0"
BETWEEN = "#76818f"
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

    photo: it shows pictures, whose colours stay as they are where the reader's screen is dark. Its
    words are then of a grey that can be read on both.
    """
    from html import escape

    buffer = io.BytesIO()
    if photo:
        for text in figure.findobj(Text):
            text.set_color(BETWEEN)
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            metadata={"Date": None},
            dpi=160,
            transparent=True,
        )
    data = base64.b64encode(buffer.getvalue()).decode()
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = "photo" if photo else "chart"
    source = f"data:image/svg+xml;base64,{data}"
    image = f'<img class="{kind}" alt="{escape(alt or caption)}" src="{source}">'
    return f'<figure><div class="scroll">{image}</div>{under}</figure>'


def thin(names: Sequence[T], most: int = MAX_PANELS) -> list[T]:
    """At most `most` of a list, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def short(name: str) -> str:
    """A site's name cut to what fits a panel, as text and not as a formula."""
    cut = shown(name if len(name) <= 24 else "..." + name[-21:])
    return cut.replace("$", r"\$")


def single(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel; its size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def panels(count: int, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many small panels, in rows of four; shared: as `Figure.subplots` takes it."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(2.5 * max(columns, 3) + 0.6, 2.1 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    axes: list[Axes] = list(grid.flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def legend(figure: Figure, colours: dict[str, str], *, patches: bool = False) -> None:
    """A legend above the panels. colours: by label; patches: areas have them, not lines."""
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
