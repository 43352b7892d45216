r"""Small calls through every GPU kernel of the op, for compute-sanitizer; not a test by itself.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tests/support/sanitizer_calls.py [plain] [ordered] [hostile] [portable] [repeated]

and the same with --tool initcheck and racecheck. Without PyTorch's caching every tensor is an
allocation of its own, so that a read past its end is one past an allocation. Lengths are odd, and
the switches for long and for large calls are lowered. Hostile calls have arguments that fit no
call, which must be refused before a kernel sees them, or, orders, be harmless.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import freqopt
from freqopt.errors import InputError
from freqopt.kernels import op, overlap, workspace
from freqopt.kernels.hopper import launch as hopper

GRID = (5, 9, 13)
TEXT = (7, 12)
QUERY_GRID = (3, 7, 9)
"""Of queries that are other tokens than the keys."""


def tensors(dtype: torch.dtype, dim: int, heads: int, kv_heads: int, text: int) -> list[Tensor]:
    """Query, key and value as views of (B, N, H, D), so with the strides that models have."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = GRID[0] * GRID[1] * GRID[2] + text
    return [
        torch.randn(1, tokens, n, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]


def call(
    name: str,
    dtype: torch.dtype,
    dim: int,
    *,
    text: bool = False,
    backward: bool = False,
    density: float = 0.0,
    probes: int = 64,
) -> None:
    """One call; prints its name, so that what the sanitizer finds can be placed."""
    before, after = TEXT if text else (0, 0)
    query, key, value = tensors(dtype, dim, 4, 2, before + after)
    key_mask = None
    if text:
        key_mask = torch.ones(1, key.shape[2], dtype=torch.bool, device="cuda")
        key_mask[:, -3:] = False
    given = [x.requires_grad_(backward) for x in (query, key, value)]
    out, stats = freqopt.split_attention(
        *given,
        grid=GRID,
        text_before=before,
        text_after=after,
        key_mask=key_mask,
        threshold=None if density else 1.3,
        density=density or None,
        probes=probes,
        return_stats=True,
    )
    if backward:
        out.float().square().sum().backward()
    torch.cuda.synchronize()
    if not bool(out.isfinite().all()):
        raise SystemExit(f"{name}: the output is not finite")
    print(f"{name}: density {float(stats.density.mean()):.3f}", flush=True)


def finite(name: str, out: Tensor) -> None:
    """Wait for a call, and say that its output is what it should be."""
    torch.cuda.synchronize()
    if not bool(out.isfinite().all()):
        raise SystemExit(f"{name}: the output is not finite")
    print(name, flush=True)


def ordered() -> None:
    """Orders by content, made and given, and queries of other tokens than the keys."""
    before, after = TEXT
    for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 96), (torch.float32, 64)):
        query, key, value = tensors(dtype, dim, 4, 2, before + after)
        t, h, w = QUERY_GRID
        other = query[:, :, : t * h * w + 3]
        options: dict[str, Any] = {"text_before": before, "text_after": after, "threshold": 1.3}
        for chunk in (256, 512, "all"):
            name = f"order by content, {dtype}, chunks of {chunk}"
            given = [x.detach().requires_grad_() for x in (query, key, value)]
            out, stats = freqopt.split_attention(
                *given, grid=GRID, order="content", chunk=chunk, return_stats=True, **options
            )
            out.float().square().sum().backward()
            finite(name, out)
            found = freqopt.split_attention(
                query, key, value, grid=GRID, order=stats.key_order, **options
            )
            finite(f"{name}, given", found)
            rectangular: dict[str, Any] = {"query_grid": QUERY_GRID, "query_text_after": 3}
            given = [x.detach().requires_grad_() for x in (other, key, value)]
            out, sums = freqopt.split_attention(
                *given,
                grid=GRID,
                order="content",
                chunk=chunk,
                return_lse=True,
                **rectangular,
                **options,
            )
            (out.float().square().sum() + sums.sum()).backward()
            finite(f"{name}, other queries", out)
        heads = torch.tensor([0, 1024], dtype=torch.int32)
        finite(
            "orders by head",
            freqopt.split_attention(query, key, value, grid=GRID, order=heads, **options),
        )
        with mock.patch.object(workspace, "LONG_TOKENS", 1):
            out = freqopt.split_attention(query, key, value, grid=GRID, order="content", **options)
        finite(f"long, order by content, {dtype}", out)


def refused(name: str, call: Callable[[], object]) -> None:
    """A call that must be refused; anything else ends the run."""
    try:
        call()
    except InputError:
        torch.cuda.synchronize()
        print(f"refused: {name}", flush=True)
        return
    raise SystemExit(f"{name} was not refused")


def arguments() -> dict[str, Any]:
    """Those of the registered op, ordered, with queries of their own, all good."""
    query, key, value = tensors(torch.bfloat16, 64, 4, 2, 19)
    tokens, queries = 5 * 9 * 13, 3 * 7 * 9
    of_keys = [torch.randperm(tokens, device="cuda") for _ in range(2)]
    of_queries = [torch.randperm(queries, device="cuda") for _ in range(4)]
    return {
        "query": query[:, :, : queries + 3],
        "key": key,
        "value": value,
        "threshold": torch.ones(4, device="cuda"),
        "key_mask": torch.ones(1, tokens + 19, dtype=torch.bool, device="cuda"),
        "grid": list(GRID),
        "text_before": 7,
        "text_after": 12,
        "scale": 0.125,
        "density": 0.0,
        "probes": 16,
        "chunks": torch.full((2,), 256, dtype=torch.int32, device="cuda"),
        "largest_chunk": 256,
        "key_order": torch.stack(of_keys)[None].int(),
        "query_order": torch.stack(of_queries)[None].int(),
        "query_layout": [*QUERY_GRID, 0, 3],
        "log_sum": True,
    }


def misfits() -> Iterator[tuple[str, dict[str, Any]]]:
    """What of another model's, another layer's or an older plan's may come instead."""
    good = arguments()
    budget, mask = good["threshold"], good["key_mask"]
    yield "a budget of one head", {"threshold": budget[:1]}
    yield "a budget of fewer heads", {"threshold": budget[:3]}
    yield "a budget of more heads", {"threshold": budget.repeat(2)}
    yield "a budget on the CPU", {"threshold": budget.cpu()}
    yield "a budget on meta", {"threshold": budget.to("meta")}
    yield "a budget in half precision", {"threshold": budget.half()}
    yield "a mask of fewer tokens", {"key_mask": mask[:, :-19]}
    yield "a mask of more items", {"key_mask": mask.repeat(2, 1)}
    yield "a mask on meta", {"key_mask": mask.to("meta")}
    yield "chunks of the query heads", {"chunks": good["chunks"].repeat(2)}
    yield "an order of fewer tokens", {"key_order": good["key_order"][..., :-1].contiguous()}
    yield "an order of one head", {"key_order": good["key_order"][:, :1]}
    yield "a query order of fewer heads", {"query_order": good["query_order"][:, :2]}
    yield "a grid of more tokens", {"grid": [5, 9, 14]}
    yield "negative text", {"text_before": -7, "text_after": 26}
    yield "queries of another layout", {"query_layout": [*QUERY_GRID, 0, 4]}
    yield "values of fewer tokens", {"value": good["value"][:, :, :-1]}


def hostile() -> None:
    """What must be refused before a launch, and orders whose numbers lead nowhere."""
    finite("the good call", op.split_attention_op(*arguments().values())[0])
    for name, changed in misfits():
        refused(
            name,
            lambda changed=changed: op.split_attention_op(*{**arguments(), **changed}.values()),
        )
    for number in (2**30, -(2**30), 0):
        good = arguments()
        for name in ("key_order", "query_order"):
            good[name] = torch.full_like(good[name], number)
        op.split_attention_op(*good.values())
        torch.cuda.synchronize()
        print(f"orders of {number} alone", flush=True)
    for value in (float("nan"), float("inf")):
        query, key, key_too = tensors(torch.bfloat16, 128, 4, 2, 0)
        query[0, 1, 20, 3] = value
        out = freqopt.split_attention(query, key, key_too, grid=GRID, threshold=1.3)
        torch.cuda.synchronize()
        if int((~out.isfinite().all(-1)).sum()) != 1:
            raise SystemExit(f"a query of {value} spoils more than its row, or nothing")
        print(f"a query of {value}", flush=True)


def portable() -> None:
    """Plain and ordered calls without the Hopper kernels, whose bulk stores initcheck misses."""
    with (
        mock.patch.object(hopper, "applies", lambda query: False),
        mock.patch.object(hopper, "prepares", lambda *given: False),
    ):
        plain()
        ordered()


def repeated() -> None:
    """Calls that are recorded, and repeated with other tensors."""
    for text in (False, True):
        for dim in (128, 64):
            for _ in range(4):
                call("repeated", torch.bfloat16, dim, text=text)
    for _ in range(4):
        with mock.patch.object(overlap, "OVERLAP_ROWS", 0):
            call("repeated, probes beside the scores", torch.bfloat16, 128, probes=32)


def main() -> None:
    """The parts that are named, or all."""
    every = (plain, ordered, hostile, portable, repeated)
    parts = {each.__name__: each for each in every}
    for name in sys.argv[1:] or parts:
        parts[name]()


def plain() -> None:
    """Each kernel at least once."""
    half = torch.bfloat16
    call("hopper", half, 128)
    call("hopper, text and mask", torch.float16, 64, text=True)
    call("portable", half, 96, text=True)
    call("float32", torch.float32, 64)
    call("density", half, 128, density=0.2)
    call("backward", half, 128, backward=True, text=True)
    call("backward", half, 64, backward=True)
    with mock.patch.object(overlap, "OVERLAP_ROWS", 0):
        call("probes beside the scores", half, 128, text=True)
    with mock.patch.object(workspace, "LONG_TOKENS", 1):
        call("long", half, 128, text=True)
        call("long, density", half, 64, density=0.2)
        call("long, portable", torch.float32, 64)


if __name__ == "__main__":
    main()
