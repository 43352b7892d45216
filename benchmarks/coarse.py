"""Would a level of superblocks above the blocks pay at a million tokens? A closed question.

`python -m benchmarks.coarse`: a superblock is 8 key blocks. Where no block of it is exact, and its
routing score, by the formula of blocks, is below a share of the threshold, one column stands for
all of it. What this saves of the low band is set beside the error that it adds, on sampled queries
of a natural field.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import RESULTS, environment, write
from benchmarks.natural import natural_attention
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.grid import token_order
from freqopt.kernels import reference as ref

MEMBERS = 8
"""Key blocks of a superblock: one octave along each axis of the lattice."""

HEAD_DIM = 128
QUERIES = 8
"""Of a tile, evenly spaced."""


class Problem(NamedTuple):
    """Query, key and value (T, D) in token order, float32; summaries of blocks and superblocks."""

    query: Tensor
    key: Tensor
    value: Tensor
    low: ref.Summary
    coarse: ref.Summary
    scale: float


def make_problem(grid: tuple[int, int, int], device: torch.device | str = "cpu") -> Problem:
    """One head of a natural field, rounded to bfloat16."""
    a = natural_attention(grid, heads=1, dim=HEAD_DIM, dtype=torch.bfloat16, device=device)
    order = token_order(grid, a.query.device).long()
    query, key, value = (x[:, :, order].float() for x in a[:3])
    low, coarse = (ref.summarise(key, value, n * KEY_BLOCK) for n in (1, MEMBERS))
    return Problem(query[0, 0], key[0, 0], value[0, 0], low, coarse, HEAD_DIM**-0.5)


class Tile(NamedTuple):
    """Queries (Q, D) of a tile with their exact attention, logits (Q, T) and scores of the tile."""

    query: Tensor
    truth: Tensor
    logit: Tensor
    own: Tensor
    low: ref.Scores
    coarse: ref.Scores


def look_at(problem: Problem, tile: int) -> Tile:
    """Everything about one tile that no threshold changes."""
    rows = problem.query[tile * QUERY_TILE : (tile + 1) * QUERY_TILE]
    low, coarse = (
        ref.score_pairs(rows[None, None], summary, problem.scale, torch.bfloat16)
        for summary in (problem.low, problem.coarse)
    )
    query = rows[:: max(len(rows) // QUERIES, 1)]
    logit = query @ problem.key.T * problem.scale
    truth = logit.softmax(-1) @ problem.value
    blocks = torch.arange(low.score.shape[-1], device=rows.device)
    return Tile(query, truth, logit, blocks * KEY_BLOCK // QUERY_TILE == tile, low, coarse)


def columns(problem: Problem, tile: Tile, summary: ref.Summary, term: Tensor) -> Tensor:
    """Logits (Q, columns) of a level of summaries, mass terms added."""
    logit = tile.query @ summary.key_mean[0, 0].T * problem.scale
    return logit + summary.counts.log() + term[0, 0, 0]


def attend(problem: Problem, tile: Tile, exact: Tensor, coarse: Tensor) -> Tensor:
    """Output (Q, D) with some blocks exact, some superblocks coarse and all else low; c = g = 1."""
    blocks = len(exact)
    behind = coarse.repeat_interleave(MEMBERS)[:blocks]
    seen = exact.repeat_interleave(KEY_BLOCK)[: len(problem.key)]
    low = columns(problem, tile, problem.low, tile.low.mass_term)
    high = columns(problem, tile, problem.coarse, tile.coarse.mass_term)
    logit = torch.cat(
        [
            tile.logit.masked_fill(~seen, -torch.inf),
            low.masked_fill(exact | behind, -torch.inf),
            high.masked_fill(~coarse, -torch.inf),
        ],
        1,
    )
    weights = logit.softmax(-1).split([len(problem.key), blocks, len(coarse)], 1)
    out = weights[0] @ problem.value
    for weight, summary in zip(weights[1:], (problem.low, problem.coarse), strict=True):
        out = out + weight @ summary.value_mean[0, 0]
        turned = tile.query @ summary.first_order[0, 0].T * problem.scale
        out = out + weight.sum(1, keepdim=True) * turned
    return out


def judge(
    problem: Problem, tiles: Sequence[Tile], threshold: float, shares: Sequence[float]
) -> list[dict[str, float]]:
    """Relative L2 error and what is served how, for superblocks below shares of a threshold."""
    rows = []
    whole = sum(float(tile.truth.square().sum()) for tile in tiles)
    for share in shares:
        off = density = served = 0.0
        for tile in tiles:
            exact = (tile.low.score[0, 0, 0] >= threshold) | tile.own
            members = torch.zeros(problem.coarse.counts.numel() * MEMBERS, dtype=torch.bool)
            members = members.to(exact.device)
            members[: len(exact)] = exact
            free = ~members.view(-1, MEMBERS).any(1)
            coarse = (tile.coarse.score[0, 0, 0] < share * threshold) & free
            off += float((attend(problem, tile, exact, coarse) - tile.truth).square().sum())
            density += float(exact.float().mean()) / len(tiles)
            served += float(coarse.float().mean()) / len(tiles)
        # Every superblock has a column, hidden or not, and so have the blocks of those not coarse.
        used = 1.0 if share == 0 else 1 / MEMBERS + 1 - served
        rows.append(
            {
                "threshold": threshold, "share": share, "density": density,
                "error": (off / whole) ** 0.5, "coarse": served, "columns": used,
            }
        )  # fmt: skip
    return rows


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; writes coarse.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="64,128,128", help="tokens t,h,w (default: %(default)s)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1.6, 2.458])
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.05, 0.1, 0.25, 0.5, 1])
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    t, h, w = (int(extent) for extent in given.grid.split(","))
    started = time.perf_counter()
    problem = make_problem((t, h, w), given.device)
    last = len(problem.query) // QUERY_TILE - 1
    chosen = torch.linspace(0, last, min(given.tiles, last + 1)).long().tolist()
    tiles = [look_at(problem, tile) for tile in chosen]
    rows: list[dict[str, float]] = []
    for threshold in given.thresholds:
        for row in judge(problem, tiles, threshold, given.shares):
            rows.append(row)
            print(
                f"threshold {threshold:g}, density {row['density']:.4f}, coarse below "
                f"{row['share']:g}: error {row['error']:.4f}, low columns x {row['columns']:.3f}",
                flush=True,
            )
    result = {
        "environment": environment(), "grid": [t, h, w], "tiles": len(tiles),
        "queries": len(tiles) * QUERIES, "rows": rows, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    print(f"wrote {write('coarse', result, given.out)}")


if __name__ == "__main__":
    main()
