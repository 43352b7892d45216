"""Would first-order matrices of groups of blocks do better than one per head? A closed question.

`python -m benchmarks.first_order`: in every layer of the zoo's DiT, at several timesteps, the
low band's first-order term is made of one matrix per head (what the op does), of one for every 16
blocks, and of every block's own, each with the scale that the probe fits to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, environment, write
from benchmarks.split_case import Case, make_case, squared_errors
from benchmarks.tensors import Attention, noised_attention
from freqopt.config import DEFAULT_PROBES, KEY_BLOCK
from freqopt.grid import token_order
from freqopt.kernels import reference as ref
from freqopt.models_zoo.video_dit import VideoDiTConfig, load_pretrained

TIMES = (0.9, 0.6, 0.3)
GROUP = 16
"""Blocks that share a matrix: 1,024 tokens."""


def block_matrices(attention: Attention) -> Tensor:
    """(1, H, J, D, D): each block's token-mean of v (k - block mean)^T, in token order."""
    order = token_order(attention.grid, attention.query.device)
    key, value = (x[:, :, order].float() for x in attention[1:3])
    low = ref.summarise(key, value, KEY_BLOCK)
    keys, values = ref.split_blocks(key, KEY_BLOCK), ref.split_blocks(value, KEY_BLOCK)
    valid = torch.arange(KEY_BLOCK) < low.counts[:, None]
    offset = (keys - low.key_mean.unsqueeze(3)) * valid[..., None]
    return torch.einsum("bhjnd,bhjne->bhjde", values, offset) / low.counts[:, None, None]


def grouped(matrices: Tensor, counts: Tensor, size: int) -> Tensor:
    """(1, H, groups, D, D): means of the matrices of `size` blocks each, weighted by tokens."""
    parts = zip(matrices.split(size, 2), counts.split(size), strict=True)
    return torch.stack(
        [(m * n[:, None, None]).sum(2) / n.sum() for m, n in parts], 2
    )  # fmt: skip


def with_matrices(case: Case, matrices: Tensor, size: int) -> Case:
    """The same case with a first-order term of one matrix (1, H, groups, D, D) per `size` blocks.

    The split multiplies its one term with the low band's mass; so the term here is the mean over
    the groups, weighted by the mass that each has at c = 1.
    """
    estimate = case.bands.estimate
    mass = (estimate.logit + estimate.term).softmax(-1).nan_to_num()
    query, term = case.query * case.scale, torch.zeros_like(case.query)
    for group, share in enumerate(mass.split(size, -1)):
        term += share.sum(-1, keepdim=True) * (query @ matrices[:, :, group].mT)
    order = torch.stack([term, torch.zeros_like(term)])
    bands = case.bands._replace(estimate=estimate._replace(order=order))
    return case._replace(bands=bands)


def judge(attention: Attention, density: float) -> dict[str, Tensor]:
    """Squared relative errors (H,) by what shares a matrix."""
    case, matrices = make_case(attention, density), block_matrices(attention)
    counts = ref.block_counts(case.tokens, KEY_BLOCK, case.query.device)
    at = ref.probe_positions(case.tokens, DEFAULT_PROBES, case.query.device)
    found = {}
    for name, size in (("per head", len(counts)), (f"per {GROUP} blocks", GROUP), ("per block", 1)):
        tried = with_matrices(case, grouped(matrices, counts, size), size)
        found[name] = squared_errors(tried.attend(tried.probe(at)), case.truth)
    bare = case.probe(at)
    out = case.attend(bare._replace(g=torch.zeros_like(bare.g)))
    found["none"] = squared_errors(out, case.truth)
    return found


def equal_cost(head_dim: int) -> float:
    """Density at which attending costs what the groups' products with every query tile do.

    A group is one product of a tile with a D x D matrix, a pair of tile and block two of D x 64.
    """
    return head_dim / (2 * KEY_BLOCK) / GROUP


def measure(grid: tuple[int, int, int], densities: Sequence[float]) -> dict[str, Any]:
    """Root mean square error over layers, heads and timesteps, by density and sharing."""
    model = load_pretrained()
    found: dict[float, dict[str, list[Tensor]]] = {density: {} for density in densities}
    for timestep in TIMES:
        for attention in noised_attention(model, grid, timestep=timestep, seed=0):
            for density in densities:
                for name, errors in judge(attention, density).items():
                    found[density].setdefault(name, []).append(errors)
    return {str(density): summary(rows) for density, rows in found.items()}


def summary(rows: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Errors, also relative to one matrix per head, and how many heads gain by more than 1 %."""
    base = torch.stack(rows["per head"])
    result = {}
    for name, errors in rows.items():
        square = torch.stack(errors)
        result[name] = {
            "error": float(square.mean().sqrt()),
            "relative": float((square.mean() / base.mean()).sqrt()),
            "median over heads": float((square / base).sqrt().median()),
            "share of heads better": float((square.sqrt() < 0.99 * base.sqrt()).float().mean()),
        }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; writes first_order.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="9,20,26", help="tokens t,h,w (default: %(default)s)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    t, h, w = (int(extent) for extent in given.grid.split(","))
    started = time.perf_counter()
    with torch.no_grad():
        found = measure((t, h, w), given.densities)
    result = {
        "environment": environment(), "grid": [t, h, w], "group": GROUP, "densities": found,
        "density of equal cost": equal_cost(VideoDiTConfig().head_dim),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    path = write("first_order", result, given.out)
    for density, rows in found.items():
        for name, row in rows.items():
            print(
                f"density {float(density):4.0%}  {name:13} error {row['error']:.4f}, "
                f"{row['relative']:.3f} of one matrix's, median {row['median over heads']:.3f}"
            )
    print(f"wrote {path} in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
