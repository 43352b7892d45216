"""Pictures of what benchmarks.calibration measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw(result: dict[str, Any], path: Path) -> None:
    """The comparison as a picture: PSNR by variant, and error against density."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from freqopt.reporting.style import BLUE, GREY, ORANGE, STYLE, percent_axis

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        densities = sorted({row["wanted_density"] for row in result["variants"]}, reverse=True)
        names = list(dict.fromkeys(row["variant"] for row in result["variants"]))
        height = 0.8 / len(densities)
        for index, (density, colour) in enumerate(zip(densities, (BLUE, "#9cc3e4"), strict=False)):
            known = {
                row["variant"]: row["psnr"]
                for row in result["variants"]
                if row["wanted_density"] == density
            }
            values = [known.get(name, np.nan) for name in names]
            at = np.arange(len(names)) + (index - 0.5 * (len(densities) - 1)) * height
            bars = left.barh(
                at, values, height, color=colour, label=f"PSNR at density {density:.0%}"
            )
            left.bar_label(bars, fmt="%.1f", padding=3, fontsize=8.5)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        low = min(row["psnr"] for row in result["variants"])
        left.set(xlabel="PSNR of the sampled video against dense (dB)", title="Ingredients")
        left.set_xlim(left=max(0.0, low - 6))
        figure.legend(loc="outside lower left", ncols=len(densities))
        for (name, points), colour in zip(result["curves"].items(), (BLUE, GREY), strict=True):
            density, error = np.array(points).T
            right.plot(density, error, "o-", color=colour, label=name)
        plan = result["plan"]
        right.axhline(plan["target_error"], color=ORANGE, lw=1.2, ls=(0, (4, 3)))
        point = [plan["unseen_density"]], [plan["unseen_error"]]
        label = "plan of freqopt.calibrate"
        right.scatter(*point, s=90, color=ORANGE, zorder=3, label=label)
        right.set(xscale="log", yscale="log", title="On unseen inputs")
        right.set(xlabel="mean density", ylabel="relative L2 error of the output")
        percent_axis(right)
        right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
        right.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
        right.tick_params(axis="y", which="minor", labelsize=8)
        right.legend(loc="lower left")
        figure.savefig(path, dpi=150)
