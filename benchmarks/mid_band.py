"""How much would the mid band save, were a pair in it to cost an eighth of an exact one?

`python -m benchmarks.mid_band`: density at one error on natural fields of several lengths, and
error at one density on the zoo DiT's own tensors, for several ratios of the mid band's threshold to
the exact one (the definition has 0.25), with sub-blocks' mass terms and without. Both count a mid
pair as an eighth. On sampled tiles, of whose queries each block's exact and approximate share is
kept: any route is then cheap to judge.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, environment, write
from benchmarks.natural import natural_attention
from benchmarks.pages import rewrite_kernels
from benchmarks.scaling import GRIDS
from benchmarks.tensors import noised_attention
from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_BLOCK
from freqopt.grid import token_order
from freqopt.kernels import reference as ref
from freqopt.models_zoo.video_dit import load_pretrained

RATIOS = (1.0, 0.5, 0.25, 0.125)
"""Of the mid band's threshold to the exact one; at 1 there is no mid band."""

HEAD_DIM = 128
TARGET = 0.06
QUERIES = 8
"""Of a tile, evenly spaced."""

TIMES = (0.9, 0.6, 0.3)
RATIO = KEY_BLOCK // SUB_BLOCK
STEPS = 18


class Tile(NamedTuple):
    """Shares of J blocks in the softmax of Q queries of a tile, relative to their true sum.

    score (J,), own (J,) bool; truth (Q, D); exact and mid: mass (Q, J) and weighted values
    (Q, J, D); mid_term (Q, J): mean mass term of a block's sub-blocks; low_logit (Q, J), low_term
    (J,), low_value (J, D); orders (2, Q, D): first-order terms of low and mid.
    """

    score: Tensor
    own: Tensor
    truth: Tensor
    exact: tuple[Tensor, Tensor]
    mid: tuple[Tensor, Tensor]
    mid_term: Tensor
    low_logit: Tensor
    low_term: Tensor
    low_value: Tensor
    orders: Tensor


def look_at(
    query: Tensor, key: Tensor, value: Tensor, chosen: Sequence[int], *, bare: bool = False
) -> list[Tile]:
    """Everything about some tiles of one head, (T, D) in token order, that no route changes.

    bare: without the mass terms of sub-blocks.
    """
    scale = key.shape[-1] ** -0.5
    low, fine = (
        ref.summarise(key[None, None], value[None, None], n) for n in (KEY_BLOCK, SUB_BLOCK)
    )
    blocks = low.counts.numel()

    def grouped(x: Tensor, size: int) -> Tensor:
        return F.pad(x, (0, 0, 0, blocks * size - len(x))).unflatten(0, (blocks, size))

    values, fine_values = grouped(value, KEY_BLOCK), grouped(fine.value_mean[0, 0], RATIO)
    tiles = []
    for tile in chosen:
        rows = query[tile * QUERY_TILE : (tile + 1) * QUERY_TILE]
        scores = ref.score_pairs(rows[None, None], low, scale, torch.bfloat16)
        some = rows[:: max(len(rows) // QUERIES, 1)][:QUERIES]
        logit = some @ key.T * scale
        total = logit.logsumexp(1, keepdim=True)
        weight = (logit - total).exp()
        exact = grouped(weight.T, KEY_BLOCK).permute(2, 0, 1)
        spread = rows.square().mean(0) @ fine.key_var[0, 0].T * scale**2
        term = torch.minimum(0.5 * spread, fine.counts.log()) * (not bare)
        fine_logit = some @ fine.key_mean[0, 0].T * scale + fine.counts.log() + term - total
        mass = grouped(fine_logit.exp().T, RATIO).permute(2, 0, 1)
        terms = (mass * grouped(term[:, None], RATIO)[..., 0]).sum(2)
        orders = [some @ x.first_order[0, 0].T * scale for x in (low, fine)]
        tiles.append(
            Tile(
                scores.score[0, 0, 0],
                torch.arange(blocks) * KEY_BLOCK // QUERY_TILE == tile,
                weight @ value,
                (exact.sum(2), torch.einsum("qjn,jnd->qjd", exact, values)),
                (mass.sum(2), torch.einsum("qjn,jnd->qjd", mass, fine_values)),
                terms / mass.sum(2).clamp(min=1e-30),
                some @ low.key_mean[0, 0].T * scale + low.counts.log() - total,
                scores.mass_term[0, 0, 0],
                low.value_mean[0, 0],
                torch.stack(orders),
            )
        )
    return tiles


class Judged(NamedTuple):
    """Relative L2 error of a route; shares of pairs exact and mid."""

    error: float
    exact: float
    mid: float

    @property
    def density(self) -> float:
        """A mid pair counted as an eighth."""
        return self.exact + self.mid / SUB_BLOCK


def judge(tiles: Sequence[Tile], threshold: float, ratio: float) -> Judged:
    """Route at a threshold, fit c and g on all queries together as the probe does, and compare."""
    exact = [(t.score >= threshold) | t.own for t in tiles]
    mid = [
        (t.score >= ratio * threshold) & ~e if ratio < 1 else torch.zeros_like(e)
        for t, e in zip(tiles, exact, strict=True)
    ]
    low = [~(e | m) for e, m in zip(exact, mid, strict=True)]
    routed = list(zip(tiles, exact, mid, low, strict=True))

    def masses(c: float) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                (t.low_logit[:, u] + c * t.low_term[u]).exp(),
                t.mid[0][:, m] * ((c - 1) * t.mid_term[:, m]).exp(),
            )
            for t, _, m, u in routed
        ]

    wanted, c = sum(float((1 - t.exact[0][:, e].sum(1)).sum()) for t, e, _, _ in routed), 1.0
    for _ in range(ref.NEWTON_STEPS):
        total = slope = 0.0
        for (a, b), (t, _, m, u) in zip(masses(c), routed, strict=True):
            total += float(a.sum() + b.sum())
            slope += float((a * t.low_term[u]).sum() + (b * t.mid_term[:, m]).sum())
        if slope > 1e-12 and wanted > 1e-12:
            c = min(max(c - math.log(total / wanted) * total / slope, 0.0), ref.C_MAX)
    parts = []
    aligned = energy = 0.0
    for (a, b), (t, e, m, u) in zip(masses(c), routed, strict=True):
        fade = (b / t.mid[0][:, m].clamp(min=1e-30))[..., None]
        one, two = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
        whole = t.exact[0][:, e].sum(1, keepdim=True) + one + two
        out = t.exact[1][:, e].sum(1) + a @ t.low_value[u] + (fade * t.mid[1][:, m]).sum(1)
        turned = (one * t.orders[0] + two * t.orders[1]) / whole
        left = t.truth - out / whole
        aligned += float((left * turned).sum())
        energy += float(turned.square().sum())
        parts.append((left, turned))
    g = min(max(aligned / max(energy, 1e-30), 0.0), ref.G_MAX)
    off = sum(float((left - g * turned).square().sum()) for left, turned in parts)
    power = sum(float(t.truth.square().sum()) for t in tiles)
    shares = [sum(float(x.float().mean()) for x in xs) / len(xs) for xs in (exact, mid)]
    return Judged((off / power) ** 0.5, *shares)


def search(tiles: Sequence[Tile], ratio: float, enough: Callable[[Judged], bool]) -> Judged:
    """The route of the largest threshold that is enough, by bisection."""
    low, high = -4.0, 4.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        good = enough(judge(tiles, 10.0**middle, ratio))
        low, high = (middle, high) if good else (low, middle)
    return judge(tiles, 10.0**low, ratio)


def spread_over(tokens: int, count: int) -> list[int]:
    """Evenly spaced tiles of a sequence."""
    last = -(-tokens // QUERY_TILE) - 1
    return sorted(set(torch.linspace(0, last, count).long().tolist()))


def in_order(tensors: Sequence[Tensor], grid: tuple[int, int, int], head: int) -> list[Tensor]:
    """One head of (1, heads, N, D) tensors in token order, float32."""
    order = token_order(grid, tensors[0].device).long()
    return [x[0, head][order].float() for x in tensors]


def natural_rows(sizes: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Density at the target error of one head of a natural field of each length."""
    rows = []
    for size in sizes:
        grid = GRIDS[size]
        a = natural_attention(grid, heads=1, dim=HEAD_DIM, dtype=torch.bfloat16, device="cpu")
        tokens = a.query.shape[2]
        for bare in (False, True):
            tiles = look_at(*in_order(a[:3], grid, 0), spread_over(tokens, count), bare=bare)
            for ratio in RATIOS[bare:]:
                found = search(tiles, ratio, lambda x: x.error <= TARGET)
                rows.append(
                    {"size": size, "tokens": tokens, "bare": bare, "ratio": ratio,
                     **found._asdict(), "density": found.density}
                )  # fmt: skip
                print(f"{size} {rows[-1]}", flush=True)
            del tiles
    return rows


def zoo_rows(
    grid: tuple[int, int, int], densities: Sequence[float], count: int
) -> list[dict[str, Any]]:
    """Error at some densities over the zoo DiT's layers, heads and timesteps."""
    found: dict[tuple[float, bool, float], list[Judged]] = {}
    model = load_pretrained()
    for timestep in TIMES:
        for a in noised_attention(model, grid, timestep=timestep, seed=0):
            chosen = spread_over(a.query.shape[2], count)
            for head, bare in itertools.product(range(a.query.shape[1]), (False, True)):
                tiles = look_at(*in_order(a[:3], grid, head), chosen, bare=bare)
                for density in densities:
                    for ratio in RATIOS[bare:]:
                        # The lowest error that this density buys.
                        best = search(tiles, ratio, lambda x, d=density: x.density >= d)  # type: ignore[misc]
                        found.setdefault((density, bare, ratio), []).append(best)
    rows = []
    for (density, bare, ratio), heads in found.items():
        off = torch.tensor([x.error for x in heads])
        without = torch.tensor([x.error for x in found[density, False, 1.0]])
        rows.append(
            {
                "at": density, "bare": bare, "ratio": ratio,
                "error": float(off.square().mean().sqrt()),
                "error_chosen_by_head": float(torch.minimum(off, without).square().mean().sqrt()),
                "heads_better": float((off < 0.98 * without).float().mean()),
                "median": float((off / without).median()),
                "exact": sum(x.exact for x in heads) / len(heads),
                "mid": sum(x.mid for x in heads) / len(heads),
            }
        )  # fmt: skip
        print(f"zoo {rows[-1]}", flush=True)
    return rows


def table(result: dict[str, Any]) -> list[str]:
    """The documentation's tables."""
    t, h, w = result["zoo_grid"]
    lines = [
        f"One head of a natural field, at relative L2 {result['target']:g}; density, of it exact "
        f"and mid pairs (commit {result['environment']['commit']}):",
        "",
        "| tokens | mass terms | no mid band | "
        + " | ".join(f"from {r:g} x threshold" for r in RATIOS[1:]) + " |",
        "|---" * (2 + len(RATIOS)) + "|",
    ]  # fmt: skip
    natural = result["natural"]
    for tokens, bare in dict.fromkeys((row["tokens"], row["bare"]) for row in natural):
        cells = [
            f"**{100 * row['density']:.1f} %**: {100 * row['exact']:.1f}, {100 * row['mid']:.1f}"
            for row in natural
            if (row["tokens"], row["bare"]) == (tokens, bare)
        ]
        cells = [""] * bare + cells
        lines.append(f"| {tokens:,} | {'no' if bare else 'yes'} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Zoo DiT, {t} x {h} x {w} tokens, all layers and heads at {len(TIMES)} timesteps; root "
        "mean square of the relative L2, and with a mid band only in heads that gain by it:",
        "",
        "| density | mid band from | mass terms | error | by head | heads better by 2 % | "
        "exact, mid pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["zoo"]:
        since = f"{row['ratio']:g} x threshold" if row["ratio"] < 1 else "none"
        lines.append(
            f"| {100 * row['at']:.0f} % | {since} | {'no' if row['bare'] else 'yes'} | "
            f"{row['error']:.4f} | "
            f"{row['error_chosen_by_head']:.4f} | {100 * row['heads_better']:.0f} % | "
            f"{100 * row['exact']:.1f}, {100 * row['mid']:.1f} % |"
        )
    return lines


rewrite_docs = partial(rewrite_kernels, "mid_band", table)
"""Put the result file's table into docs/kernels.md; with `check` only say if it is there."""


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; writes mid_band.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="*", default=["64K", "128K", "256K", "512K", "1M"], choices=GRIDS
    )
    parser.add_argument("--grid", default="9,30,52", help="the zoo's tokens (default: %(default)s)")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.05, 0.1])
    parser.add_argument("--tiles", type=int, default=40, help="of a natural field")
    parser.add_argument("--zoo-tiles", type=int, default=12, help="of each of the zoo's heads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--docs", action="store_true", help="only rewrite the docs' tables")
    given = parser.parse_args(arguments)
    if given.docs:
        rewrite_docs(check=False)
        return
    t, h, w = (int(extent) for extent in given.grid.split(","))
    started = time.perf_counter()
    result = {
        "environment": environment(), "target": TARGET,
        "natural": natural_rows(given.sizes, given.tiles),
        "zoo_grid": [t, h, w], "zoo": zoo_rows((t, h, w), given.densities, given.zoo_tiles),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    print(f"wrote {write('mid_band', result, given.out)}")


if __name__ == "__main__":
    main()
