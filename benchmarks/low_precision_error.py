"""Error of 8-bit products in the exact blocks: `python -m benchmarks.low_precision_error`.

Emulates, in float32, keys, queries, values and softmax weights rounded to e4m3 or int8, around the
mean of their head or of their block, on the trained DiT's own tensors. Low band, route and probe
stay what they are. Every few query tiles of every head are compared with exact attention. No GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import environment, write
from benchmarks.tensors import noised_attention
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.grid import token_order
from freqopt.kernels import reference as ref
from freqopt.models_zoo.video_dit import load_pretrained

Kind = Literal["e4m3", "int8"]

DENSITIES = (0.05, 0.1, 0.2)
WEIGHT_SCALE = 256.0
"""Factor of softmax weights before they are rounded to e4m3: 448 is its largest number, and below
1/64 it loses digits."""


class Rounding(NamedTuple):
    """How one operand is rounded: to what, around which mean, with one step for what."""

    kind: Kind
    around: Literal["head", "block"]
    step: Literal["head", "block"]


class Choice(NamedTuple):
    """Operands of an exact block's products: None is bfloat16. Queries go with the keys, weights
    with the values; both have a step per row."""

    keys: Rounding | None = None
    values: Rounding | None = None


KEYS8 = Rounding("int8", "head", "head")
VALUES8 = Rounding("e4m3", "head", "head")
BLOCK8 = Rounding("e4m3", "block", "block")
CHOICES = {
    "bf16": Choice(),
    "keys e4m3, head's mean": Choice(Rounding("e4m3", "head", "head")),
    "keys e4m3, block's mean": Choice(BLOCK8),
    "keys int8, head's mean": Choice(KEYS8),
    "keys int8, head's mean, step per block": Choice(Rounding("int8", "head", "block")),
    "keys int8, block's mean": Choice(Rounding("int8", "block", "block")),
    "values e4m3, head's mean": Choice(None, VALUES8),
    "keys int8 + values e4m3, head's mean": Choice(KEYS8, VALUES8),
    "keys int8 + values e4m3, block's mean": Choice(KEYS8, BLOCK8),
    "keys e4m3 + values e4m3, block's mean": Choice(BLOCK8, BLOCK8),
}


def rounded(x: Tensor, kind: Kind, dims: tuple[int, ...]) -> Tensor:
    """`x` in 8 bits with one step over `dims`, the smallest that the largest value fits."""
    largest = x.abs().amax(dims, keepdim=True).clamp(min=1e-20)
    if kind == "int8":
        return (x * (127 / largest)).round() * (largest / 127)
    return (x * (448 / largest)).to(torch.float8_e4m3fn).float() * (largest / 448)


class Head(NamedTuple):
    """One head in token order: query (N, D), blocks of keys and values (J, 64, D) with zeros past
    the end, its summary and scores, the route (I, J), and the probe's c and g."""

    query: Tensor
    keys: Tensor
    values: Tensor
    low: ref.Summary
    mass_term: Tensor
    route: Tensor
    c: float
    g: float

    @property
    def valid(self) -> Tensor:
        """(J, 64): which rows are tokens."""
        return torch.arange(KEY_BLOCK) < self.low.counts[:, None]

    def around(self, blocks: Tensor, means: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Blocks rounded around their mean, without it, and the mean (J, 1, D) itself."""
        mean = means[:, None]
        if rounding.around == "head":
            share = self.low.counts[:, None, None] / self.low.counts.sum()
            mean = (mean * share).sum(0, keepdim=True).expand_as(mean)
        offset = (blocks - mean) * self.valid[..., None]
        dims = (1, 2) if rounding.step == "block" else (0, 1, 2)
        return rounded(offset, rounding.kind, dims), mean


def attend(head: Head, tile: int, choice: Choice, operands: dict[str, Any]) -> Tensor:
    """The split's output (128, D) of one query tile, its exact blocks' products as chosen.

    operands: `Head.around` of keys and values, as far as the choice has them.
    """
    query = head.query[tile * QUERY_TILE : (tile + 1) * QUERY_TILE]
    scale, low = query.shape[1] ** -0.5, head.low
    route, index = head.route[tile], (head.route[tile] == ref.EXACT).nonzero()[:, 0]
    logit = query @ low.key_mean[0, 0].T * scale + low.counts.log() + head.c * head.mass_term[tile]
    logit = logit.masked_fill(route != ref.LOW, -torch.inf)
    bias = torch.where(head.valid[index], 0.0, -torch.inf).flatten()
    if choice.keys is None:
        exact = query @ head.keys[index].flatten(0, 1).T * scale + bias
    else:
        offset, mean = operands["keys"]
        rows = rounded(query, choice.keys.kind, (1,))
        exact = rows @ offset[index].flatten(0, 1).T * scale + bias
        exact = exact + (query @ mean[index, 0].T * scale).repeat_interleave(KEY_BLOCK, 1)
    peak = torch.maximum(logit.amax(1), exact.amax(1))[:, None]
    low_weight, weight = (logit - peak).exp(), (exact - peak).exp()
    low_mass, mass = low_weight.sum(1, keepdim=True), weight.sum(1, keepdim=True)
    out = low_weight.bfloat16().float() @ low.value_mean[0, 0]
    out = out + head.g * low_mass * (query @ low.first_order[0, 0].T * scale)
    if choice.values is None:
        out = out + weight.bfloat16().float() @ head.values[index].flatten(0, 1)
    else:
        offset, mean = operands["values"]
        weight8 = (weight * WEIGHT_SCALE).to(torch.float8_e4m3fn).float() / WEIGHT_SCALE
        out = out + weight8 @ offset[index].flatten(0, 1)
        out = out + weight.unflatten(1, (-1, KEY_BLOCK)).sum(2) @ mean[index, 0]
    return out / (low_mass + mass)


def route_heads(
    tensors: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int], density: float
) -> list[Head]:
    """All heads of (1, H, N, D) tensors at the one threshold that has this mean density."""
    order = token_order(grid, tensors[0].device).long()
    query, key, value = (x[:, :, order] for x in tensors)
    heads, scale = query.shape[1], query.shape[3] ** -0.5
    lows, scores = [], []
    for h in range(heads):
        q, k, v = (x[:, h : h + 1].float() for x in (query, key, value))
        lows.append(ref.summarise(k, v, KEY_BLOCK))
        scores.append(ref.score_pairs(q, lows[h], scale, torch.bfloat16))
    every = torch.cat([s.score for s in scores], 1)
    every = every.masked_fill(ref.own_blocks(*every.shape[2:], every.device), torch.inf)
    kept = min(int(density * every.numel()), every.numel() - 1)
    threshold = every.flatten().sort(descending=True).values[kept].expand(1, 1)
    found = []
    for h in range(heads):
        q, k, v = (x[:, h : h + 1].float() for x in (query, key, value))
        low, score = lows[h], scores[h]
        route = ref.route_pairs(score.score, threshold, threshold)
        chosen = ref.probe_positions(q.shape[2], 64, q.device)
        nothing, no_bias = q[:, :, :0], q.new_zeros(1, 1, 1, 0)
        bands = ref.make_bands(
            q[:, :, chosen], chosen // QUERY_TILE, k, v, nothing, nothing, no_bias, route, low,
            None, score, ref.tile_mean_square(q), scale,
        )  # fmt: skip
        probe = ref.fit_probe(
            ref.observe(bands, q[:, :, chosen] @ k.mT * scale), bands.estimate
        )  # fmt: skip
        found.append(
            Head(
                q[0, 0], ref.split_blocks(k, KEY_BLOCK)[0, 0], ref.split_blocks(v, KEY_BLOCK)[0, 0],
                low, score.mass_term[0, 0], route[0, 0], float(probe.c), float(probe.g),
            )
        )  # fmt: skip
    return found


def head_errors(head: Head, stride: int) -> dict[str, list[float]]:
    """[L1, L2, noise L1, noise L2] of each choice, relative to exact attention's output.

    Noise is the distance from what the split gives in bfloat16.
    """
    tokens, scale = head.query.shape[0], head.query.shape[1] ** -0.5
    keys, values = (x.flatten(0, 1)[:tokens] for x in (head.keys, head.values))
    operands = {
        name: {
            "keys": c.keys and head.around(head.keys, head.low.key_mean[0, 0], c.keys),
            "values": c.values and head.around(head.values, head.low.value_mean[0, 0], c.values),
        }
        for name, c in CHOICES.items()
    }
    sums = {name: torch.zeros(4) for name in CHOICES}
    norm = torch.zeros(2)
    for tile in range(min(stride // 2, len(head.route) - 1), len(head.route), stride):
        query = head.query[tile * QUERY_TILE : (tile + 1) * QUERY_TILE]
        truth = (query @ keys.T * scale).softmax(-1) @ values
        norm += torch.stack([truth.abs().sum(), truth.square().sum()])
        plain = attend(head, tile, CHOICES["bf16"], {})
        for name, choice in CHOICES.items():
            out = attend(head, tile, choice, operands[name])
            for i, off in enumerate((out - truth, out - plain)):
                sums[name][2 * i : 2 * i + 2] += torch.stack([off.abs().sum(), off.square().sum()])
    return {
        name: [float(x) for x in (s / norm.repeat(2)).pow(torch.tensor([1, 0.5, 1, 0.5]))]
        for name, s in sums.items()
    }


@torch.no_grad()
def measure(
    tensors: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int], density: float, stride: int
) -> dict[str, Any]:
    """Mean errors over heads of every choice, and those of each head, at one density."""
    heads = route_heads(tensors, grid, density)
    found = [head_errors(head, stride) for head in heads]
    densities = [float((head.route == ref.EXACT).float().mean()) for head in heads]
    names = ("l1", "l2", "noise_l1", "noise_l2")
    rows = []
    for name in CHOICES:
        each = torch.tensor([row[name] for row in found])
        rows.append(
            {"choice": name, **dict(zip(names, each.mean(0).tolist(), strict=True)),
             "head_l2": each[:, 1].tolist()}
        )  # fmt: skip
    return {
        "density": sum(densities) / len(densities), "head_density": densities, "rows": rows,
    }  # fmt: skip


def tensors_of(grid: tuple[int, int, int], kept: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of all layers' heads, (1, H, N, D) bfloat16; read from `kept` if that exists."""
    if kept and kept.exists():
        query, key, value, known = torch.load(kept, weights_only=True)
        if tuple(known) != grid:
            raise SystemExit(f"{kept} holds tensors of grid {known}, not {grid}; name another file")
        return query, key, value
    with torch.no_grad():
        layers = noised_attention(load_pretrained(), grid, timestep=0.6, seed=0)
    query, key, value = (torch.cat([x[i] for x in layers], 1).bfloat16() for i in range(3))
    if kept:
        torch.save((query, key, value, grid), kept)
    return query, key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52))
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--stride", type=int, default=64, help="of query tiles that are compared")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--tensors", type=Path, help="file that keeps Q, K and V for the next run")
    arguments = parser.parse_args()
    grid = tuple(arguments.grid)
    query, key, value = tensors_of(grid, arguments.tensors)
    found = []
    for density in arguments.densities:
        found.append(measure((query, key, value), grid, density, arguments.stride))
        print(f"density {found[-1]['density']:.3f}")
        for row in found[-1]["rows"]:
            print(
                f"  {row['choice']:40} L1 {row['l1']:.4f}  L2 {row['l2']:.4f}  "
                f"noise L1 {row['noise_l1']:.4f}  L2 {row['noise_l2']:.4f}",
                flush=True,
            )
    result = {
        "environment": environment(), "grid": grid, "heads": query.shape[1],
        "stride": arguments.stride, "densities": found,
    }  # fmt: skip
    print(f"wrote {write('low_precision_error', result, arguments.out)}")


if __name__ == "__main__":
    main()
