"""A grid that the user gives although the graph shows another one: what was given counts, aloud."""

from __future__ import annotations

import math

from torch import fx

from freqopt.grid import Grid
from freqopt.passes.find import find_sites


def contradiction(gm: fx.GraphModule, given: Grid | None) -> str:
    """What is to be said where a graph shows other extents than were given; empty if it does not.

    Of as many tokens: a grid that does not fit leaves a site dense, with the reason.
    """
    if given is None:
        return ""
    shown = {
        site.name: site.grid
        for site in find_sites(gm)
        if site.grid is not None
        and all(isinstance(extent, int) for extent in site.grid)
        and math.prod(site.grid) == math.prod(given)
    }
    others = {name: grid for name, grid in shown.items() if tuple(grid) != tuple(given)}
    if not others:
        return ""
    name, grid = next(iter(others.items()))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return (
        f"grid={tuple(given)} was given and the graph shows {'x'.join(map(str, grid))} at {name}"
        f"{more}: the given one counts; leave it out unless the model orders its tokens otherwise"
    )
