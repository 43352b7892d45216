"""The picture of how the split works, docs/split.svg: `python -m benchmarks.docs` writes it.

The curve is the real token order of a small grid. The route is a sketch: blocks that lie near a
tile, and those of one object, are exact. It reads on light and on dark pages: the panel brings its
own background, and all colours change together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from freqopt.grid import token_order

SIDE = 8
"""Rows and columns of the small grid."""

BLOCK = 4
"""Tokens of a block in the picture; 64 in the op."""

TILE = 8
"""Tokens of a tile in the picture; 128 in the op."""

OBJECT = {(0, 4), (0, 5), (1, 4), (1, 5), (6, 2), (6, 3), (7, 2), (7, 3)}
"""Cells (row, column) of something that looks the same in two places."""

NEAR = 2.3
"""Distance between centres, in cells, within which a block is exact."""

SHOWN = 1
"""The tile whose blocks are drawn one by one."""

STYLE = """
text { font-family: -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; font-size: 13px;
       fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 } .small { font-size: 12px; fill: #59636e }
.page { fill: #ffffff; stroke: #d1d9e0 } .line { stroke: #59636e; fill: none }
.cell { fill: #f1f4f8; stroke: #ffffff } .thing { fill: #ffdf8a; stroke: #ffffff }
.curve { stroke: #0b62d0; stroke-width: 2; fill: none; stroke-linejoin: round }
.high { fill: #0b62d0 } .low { fill: #c4daf5 } .box { fill: #f1f4f8; stroke: #d1d9e0 }
.frame { fill: none; stroke: #bf5700; stroke-width: 2.5 }
.probe { fill: #fff4d6; stroke: #d9b44a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9da7b3 }
  .page { fill: #12171e; stroke: #3d444d } .line { stroke: #9da7b3 }
  .cell { fill: #232b35; stroke: #12171e } .thing { fill: #7a5c10; stroke: #12171e }
  .curve { stroke: #58a6ff } .high { fill: #58a6ff } .low { fill: #24405f }
  .box { fill: #1b222b; stroke: #3d444d } .frame { stroke: #f0883e }
  .probe { fill: #2e2610; stroke: #8a6d1f }
}
"""

Cell = tuple[int, int]


def cells() -> list[Cell]:
    """The grid's cells (row, column) in token order."""
    order = token_order((1, SIDE, SIDE), torch.device("cpu")).tolist()
    return [divmod(index, SIDE) for index in order]


def is_exact(tile: list[Cell], block: list[Cell]) -> bool:
    """Whether the sketch's route lifts a pair."""
    far = math.dist(centre(tile), centre(block))
    return far < NEAR or (bool(OBJECT & set(tile)) and len(OBJECT & set(block)) > 1)


def centre(some: list[Cell]) -> tuple[float, float]:
    """Mean row and column."""
    return sum(row for row, _ in some) / len(some), sum(column for _, column in some) / len(some)


def parts(size: int) -> list[list[Cell]]:
    """Cells of each block or tile, in token order."""
    path = cells()
    return [path[start : start + size] for start in range(0, len(path), size)]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text; kind: a class of STYLE."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{attribute}>{words}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, radius: int = 0) -> str:
    """A rectangle; kind: a class of STYLE."""
    corners = f' rx="{radius}"' if radius else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{corners} class="{kind}"/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A line with a head at its end."""
    return (
        f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" class="line" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def order_panel(x: float, y: float, size: float) -> Iterator[str]:
    """The grid and the curve through it."""
    yield text(x + SIDE * size / 2, y - 18, "1  order tokens", "title")
    for row in range(SIDE):
        for column in range(SIDE):
            kind = "thing" if (row, column) in OBJECT else "cell"
            yield rect(x + column * size, y + row * size, size, size, kind)
    points = [f"{x + (c + 0.5) * size:g} {y + (r + 0.5) * size:g}" for r, c in cells()]
    yield f'<path d="M{" L".join(points)}" class="curve"/>'
    for line, words in enumerate(("along a Hilbert curve:", "a block is a compact piece")):
        yield text(x + SIDE * size / 2, y + SIDE * size + 20 + 17 * line, words, "small")


def route_panel(x: float, y: float, width: float, height: float) -> Iterator[str]:
    """Tiles by blocks, those that are exact in full colour."""
    tiles, blocks = parts(TILE), parts(BLOCK)
    yield text(x + len(blocks) * width / 2, y - 18, "2  route query tiles to key blocks", "title")
    for i, tile in enumerate(tiles):
        for j, block in enumerate(blocks):
            kind = "high" if is_exact(tile, block) else "low"
            yield rect(x + j * width, y + i * height, width - 1.5, height - 1.5, kind)
    yield rect(x - 2.5, y + SHOWN * height - 2.5, len(blocks) * width + 3.5, height + 3.5, "frame")
    middle, below = x + len(blocks) * width / 2, y + len(tiles) * height
    yield text(middle, below + 20, "exact where a mean would cause error: near by,", "small")
    yield text(middle, below + 37, "and at one thing in two places (yellow)", "small")


def attend_panel(x: float, y: float, width: float) -> Iterator[str]:
    """One tile's blocks: tokens where they are exact, else one mean."""
    tile, blocks = parts(TILE)[SHOWN], parts(BLOCK)
    yield text(x + len(blocks) * width / 2, y - 23, "3  attend, one tile of queries", "title")
    for j, block in enumerate(blocks):
        left = x + j * width
        if is_exact(tile, block):
            for k in range(4):
                yield rect(left + k * (width - 3) / 4, y, (width - 3) / 4 - 1.2, 40, "high")
        else:
            yield rect(left, y + 14, width - 4, 12, "low", 3)
    end = x + len(blocks) * width
    yield rect(x - 4, y - 5, len(blocks) * width + 6, 50, "frame", 4)
    yield rect(x, y + 64, 13, 13, "high")
    yield text(x + 20, y + 75, "high band: every key, and all text", "", "start")
    yield rect(x, y + 86, 13, 13, "low")
    yield text(x + 20, y + 97, "low band: a block's mean, count and variance", "", "start")
    yield arrow(x + (end - x) / 2, y + 106, x + (end - x) / 2, y + 124)
    yield rect(x, y + 128, end - x, 38, "box", 6)
    yield text(x + (end - x) / 2, y + 152, "one softmax over both", "title")


def draw() -> str:
    """The whole picture, as SVG."""
    body = [
        rect(1, 1, 958, 338, "page", 10),
        *order_panel(28, 62, 21),
        arrow(210, 146, 236, 146),
        *route_panel(252, 62, 18, 21),
        arrow(556, 146, 582, 146),
        *attend_panel(602, 67, 20.5),
        rect(28, 284, 904, 36, "probe", 6),
        text(
            480,
            307,
            "4  probe: 64 queries a head, attended exactly in every call, "
            "remove the bias and measure the error of that call",
        ),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 340" role="img">\n'
        "<title>How the split works: order, route, attend, probe</title>\n"
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8" class="line" stroke-width="1.5"/>'
        "</marker></defs>\n"
    )
    return head + "\n".join(body) + "\n</svg>\n"
