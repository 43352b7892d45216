"""The kernel of the text queries, which only onnxruntime launches, against PyTorch's attention.

Run by test_onnx_glue.py in a process of its own: Triton's interpreter mode is fixed at its import.
Everything else that onnxruntime launches is what `kernels.forward.split` launches too.
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
from attention_cases import CASES, Case, dense, make_tensors, relative

from freqopt.kernels.forward.call import Call, Order
from freqopt.kernels.forward.summaries import summarise
from freqopt.kernels.portable import glue
from freqopt.kernels.tiles import launch_for, padded_dim

DEVICE = "cuda" if ON_GPU else "cpu"


def attend_text(case: Case, tensors: tuple) -> torch.Tensor:
    """(B, H, N, D) whose text rows the kernel wrote; NaN elsewhere."""
    query, key, value, mask = tensors
    sequence, heads, tokens = case.sequence, query.shape[1], case.sequence.tokens
    launch = launch_for(query.dtype, query.shape[-1])
    order = Order.shared(sequence.base_order(query.device))
    summaries = summarise(
        Call(query, key, value, None, sequence, order, sequence, order, True, 1.0, launch)
    )
    blocks = triton.cdiv(tokens, 64)
    out = torch.full_like(query, torch.nan)
    given = mask if mask is not None else query
    glue.text_kernel[(triton.cdiv(sequence.text, 64), query.shape[0] * heads)](
        query,
        summaries.key,
        summaries.value,
        key,
        value,
        given,
        out,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        mask.stride(0) if mask is not None else 0,
        *out.stride()[:3],
        heads,
        heads // key.shape[1],
        tokens,
        blocks,
        sequence.text,
        sequence.text_before,
        query.shape[-1] ** -0.5,
        D=query.shape[-1],
        DP=padded_dim(query.shape[-1]),
        BM=64,
        HAS_MASK=mask is not None,
        PRECISION=launch.precision,
    )
    return out


def compare(name: str) -> dict[str, object]:
    """Of a problem and a type, as "1 float16"."""
    number, kind = name.split()
    case, dtype = CASES[int(number)], getattr(torch, kind)
    query, key, value, mask = make_tensors(case)
    given = (*(x.to(DEVICE, dtype) for x in (query, key, value)), mask)
    out = attend_text(case, given if mask is None else (*given[:3], mask.to(DEVICE))).cpu()
    truth = case.sequence.text_of(dense(case, (*(x.cpu() for x in given[:3]), mask)))
    untouched = bool(case.sequence.video_of(out).isnan().all())
    found = relative(case.sequence.text_of(out), truth)
    return {"text": found, "video_untouched": untouched}


if __name__ == "__main__":
    print(json.dumps({name: compare(name) for name in sys.argv[1:]}))
