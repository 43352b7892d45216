"""The pipeline that onnxruntime launches, kernels only, compared with the PyTorch-glued one.

Run by test_onnx_glue.py in a process of its own: Triton's interpreter mode is fixed at its import.
"""

from __future__ import annotations

import json
import os
import sys

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from attention_cases import CASES, Case, budget_for, make_tensors, relative

from freqopt.kernels import triton_glue as glue
from freqopt.kernels import triton_split as split
from freqopt.kernels.layout import Sequence

DEVICE = "cuda" if ON_GPU else "cpu"


def run_glue(
    case: Case, tensors: tuple, budget: torch.Tensor, probes: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The onnxruntime pipeline: only kernels, in the order of exporters/ort/split_cuda.cc."""
    query, key, value, mask = tensors
    sequence: Sequence = case.sequence
    batch, heads, length, dim = query.shape
    kv_heads, scale, padded = key.shape[1], dim**-0.5, split.padded_dim(dim)
    launch = split.launch_for(query.dtype, dim, split.shared_memory(query.device))
    tokens = sequence.tokens
    blocks, tiles = triton.cdiv(tokens, 64), triton.cdiv(tokens, 128)
    groups = triton.cdiv(blocks, split.GROUP)
    order = split.token_order(sequence.grid, query.device).long()

    def f32(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=query.device)

    def native(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=query.device, dtype=query.dtype)

    pairs, kv = batch * heads, batch * kv_heads
    limits = f32(pairs, 2)
    glue.limits_kernel[(pairs,)](budget, limits, heads, MID=case.mid)
    key_out, value_out = native(kv, blocks * 64, dim), native(kv, blocks * 64, dim)
    key_mean, value_mean, key_var = (f32(kv, blocks, dim) for _ in range(3))
    spread, first, fine_first = (
        f32(kv, blocks),
        f32(kv, groups, dim, dim),
        f32(kv, groups, dim, dim),
    )
    rows = blocks * 8 if case.mid else 1
    fine_key, fine_value, fine_var = (
        native(kv, rows, dim),
        native(kv, rows, dim),
        f32(kv, rows, dim),
    )
    split.summarise_kernel[(groups, kv)](
        key, value, order, key_out, value_out, key_mean, value_mean, key_var, spread, first,
        fine_key, fine_value, fine_var, fine_first, *key.stride()[:3], *value.stride()[:3],
        kv_heads, tokens, blocks, sequence.text_before,
        D=dim, DP=padded, GROUP=split.GROUP, MID=case.mid, num_warps=8, num_stages=1,
    )  # fmt: skip
    key_shift, low_key, low_value = f32(kv, dim), native(kv, blocks, dim), native(kv, blocks, dim)
    glue.centre_kernel[(kv,)](
        key_mean, value_mean, spread, key_shift, low_key, low_value, tokens, blocks,
        D=dim, DP=padded, BJ=32,
    )  # fmt: skip
    low_order, fine_order = native(kv, dim, dim), native(kv, dim, dim)
    for source, target in [(first, low_order), (fine_first, fine_order)][: 1 + case.mid]:
        glue.order_kernel[(triton.cdiv(dim * dim, 1024), kv)](
            source, target, groups, tokens, dim * dim, CELLS=1024
        )
    score, term = f32(pairs, tiles, blocks), f32(pairs, tiles, blocks).half()
    split.score_kernel[(triton.cdiv(tiles, launch.score_tiles), pairs)](
        query, order, key_mean, key_var, spread, score, term, *query.stride()[:3],
        heads, heads // kv_heads, tokens, tiles, blocks, sequence.text_before, scale,
        D=dim, DP=padded, TILES=launch.score_tiles, BJ=split.SCORE_BLOCKS,
        PRECISION=launch.score_precision,
    )  # fmt: skip
    route = torch.full((pairs, tiles, blocks), 99, dtype=torch.int8, device=query.device)
    exact_list, mid_list = (route.int() for _ in range(2))
    counts = torch.zeros(pairs, tiles, 2, dtype=torch.int32, device=query.device)
    split.route_kernel[(tiles, pairs)](
        score, limits, term, route, exact_list, mid_list, counts, tiles, blocks,
        BJ=min(triton.next_power_of_2(blocks), 1024), MID=case.mid,
    )  # fmt: skip
    probes = min(probes, tokens)
    parts = min(split.PROBE_PARTS, blocks)
    peak, mass = f32(pairs, parts, probes), f32(pairs, parts, probes, 2)
    exact, missing = f32(pairs, parts, probes, dim), f32(pairs, parts, probes, dim)
    given = mask if mask is not None else route
    stride_mb = mask.stride(0) if mask is not None else 0
    split.probe_kernel[(parts, pairs, triton.cdiv(probes, launch.probe_rows))](
        query, order, key_out, value_out, key, value, given, route, key_shift,
        peak, mass, exact, missing, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        stride_mb, heads, heads // kv_heads, tokens, tiles, blocks, probes, sequence.text,
        sequence.text_before, scale,
        D=dim, DP=padded, BP=launch.probe_rows, HAS_MASK=mask is not None,
        PRECISION=launch.precision,
    )  # fmt: skip
    pooled = f32(pairs, probes, dim)
    if case.mid:
        glue.pool_kernel[(probes, pairs)](
            query, order, pooled, *query.stride()[:3], heads, tokens, probes,
            sequence.text_before, D=dim, DP=padded,
        )  # fmt: skip
    coefficients = f32(pairs, 2)
    glue.fit_kernel[(pairs,)](
        query, order, low_key, low_value, low_order, fine_key, fine_value, fine_var, fine_order,
        key_shift, term, route, pooled, peak, mass, exact, missing, coefficients,
        *query.stride()[:3], heads, heads // kv_heads, tokens, tiles, blocks, probes, parts,
        sequence.text_before, scale,
        D=dim, DP=padded, BP=32, BJ=32, MID=case.mid, PRECISION=launch.score_precision,
    )  # fmt: skip
    out = native(batch, length, heads, dim).transpose(1, 2)
    split.attend_kernel[(triton.cdiv(tokens, launch.rows), pairs)](
        query, order, key_out, value_out, key, value, given, key_shift, low_key, low_value,
        low_order, fine_key, fine_value, fine_var, fine_order, term, coefficients, exact_list,
        mid_list, counts, out, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        stride_mb, *out.stride()[:3], heads, heads // kv_heads, tokens, tiles, blocks,
        sequence.text, sequence.text_before, scale,
        D=dim, DP=padded, BM=launch.rows, MID=case.mid, TEXT=sequence.text > 0,
        HAS_MASK=mask is not None, RAGGED=True, PRECISION=launch.precision,
    )  # fmt: skip
    if sequence.text:
        glue.text_kernel[(triton.cdiv(sequence.text, 64), pairs)](
            query, key_out, value_out, key, value, given, out,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], stride_mb,
            *out.stride()[:3], heads, heads // kv_heads, tokens, blocks, sequence.text,
            sequence.text_before, scale,
            D=dim, DP=padded, BM=64, HAS_MASK=mask is not None, PRECISION=launch.precision,
        )  # fmt: skip
    return out, coefficients.view(batch, heads, 2)


def main(index: int, name: str) -> None:
    """Print how far the two pipelines are apart on a case, as JSON."""
    case, dtype = CASES[index], getattr(torch, name)
    raw = make_tensors(case)
    mask = None if raw[3] is None else raw[3].to(DEVICE)
    tensors = (*(x.to(DEVICE, dtype) for x in raw[:3]), mask)
    budget = budget_for(case, raw, 0.3).to(DEVICE)
    out, coefficients = run_glue(case, tensors, budget)
    expected = split.split_forward(
        *tensors[:3], budget, mask, case.sequence, scale=case.dim**-0.5, density=0.0,
        mid_band=case.mid, probes=64,
    )  # fmt: skip
    far = float((coefficients - expected[4]).abs().max())
    print(json.dumps({"out": relative(out, expected[0]), "coefficients": far}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
