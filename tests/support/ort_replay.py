"""Runs the library's launches one by one in Triton's interpreter, against the definition.

Run by test_onnx_cuda.py in a process of its own: the interpreter is chosen at Triton's import. The
program that launches knows addresses only; here they become views of tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from attention_cases import (
    Case,
    budget_for,
    dense,
    make_tensors,
    orders_of,
    reference_split,
    relative,
)
from interpreted import prepare_interpreter
from ort_programs import Programs

from freqopt.kernels.content_order import spread
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.specialise import NATIVE, POINTERS, specialisations
from freqopt.kernels.variant import Variant

prepare_interpreter()
ABOUT = Variant(80, "float16", 64, False, content=True)
TYPES = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i8": torch.int8,
    "*i1": torch.bool,
}
WORKSPACE = 0x100000
CASES = [
    Case((4, 5, 9), dim=64, batch=1, before=3, after=5, chunk=256),
    Case((1, 1, 300), dim=64, heads=2, kv_heads=1, chunk=512),
    Case((5, 7, 9), dim=64, batch=1, before=3, after=5, queries=(2, 5, 7)),
    Case(
        (1, 1, 280),
        dim=64,
        heads=2,
        kv_heads=1,
        batch=1,
        chunk=256,
        queries=(1, 1, 150),
        query_before=2,
        query_after=3,
    ),
]
"""By content on a grid with text, in a batch; and queries of other tokens, by the grid or not."""

EXACT = (1, 3)
"""Those that are run at threshold 0 as well, where every order gives dense attention."""


def replay(
    programs: Programs, given: dict[int, torch.Tensor], *arguments: object
) -> tuple[torch.Tensor, dict[str, int]]:
    """Run the launches of a call; given: the tensors at its made-up addresses.

    Returns the workspace (bytes,) uint8, and where its tensors lie.
    """
    lines = programs.run(*arguments, capability=80, FAKE_IMAGES="1")  # type: ignore[arg-type]
    failed = [line for line in lines if line[0] == "error"]
    assert not failed, failed
    kernels = {s.name: s for s in specialisations(ABOUT)}
    names = {line[1]: line[2] for line in lines if line[0] == "cubin"}
    size = next(int(line[1]) for line in lines if line[0] == "bytes")
    memory = torch.full((size,), 0x7F, dtype=torch.uint8)

    def tensor(name: str, at: int) -> torch.Tensor:
        if at < WORKSPACE:
            return given[at]
        kind = torch.float16 if name in NATIVE else TYPES[POINTERS[name]]
        left = memory[at - WORKSPACE :]
        return left[: len(left) // 8 * 8].view(kind)

    image = ""
    for line in lines:
        if line[0] == "image":
            image = line[1]
        elif line[0] == "fill":
            at, word, count = (int(x) for x in line[1:])
            memory[at - WORKSPACE :][: 4 * count].view(torch.int32).fill_(word)
        elif line[0] == "launch":
            _run(kernels[names[image]], line, tensor)
    return memory, {line[1]: int(line[2]) for line in lines if line[0] == "buffer"}


def _run(given: Any, line: list[str], tensor: Any) -> None:
    function, constants = given.function, given.constants
    taken = [n for n in function.arg_names if n not in constants]
    values = dict(zip(taken, map(int, line[8:]), strict=False))
    arguments = {}
    for name in taken:
        if name in NATIVE or name in POINTERS:
            arguments[name] = tensor(name, values[name])
        elif name == "scale":
            arguments[name] = struct.unpack("f", struct.pack("I", values[name]))[0]
        else:
            arguments[name] = values[name]
    function[tuple(int(x) for x in line[2:5])](**arguments, **constants, **given.options)


def ordered(programs: Programs, x: torch.Tensor, layout: TokenLayout, chunk: int) -> torch.Tensor:
    """The order (B, H, T) that the launches make of tokens (B, H, N, D), in equal chunks."""
    base = layout.base_order(x.device)
    if not chunk:
        return base.long()
    order = torch.full((*x.shape[:2], layout.tokens), -1)
    chunks = torch.tensor([chunk], dtype=torch.int32)
    given = {0x2000: x.contiguous(), 0x6000: base.long(), 0x9000: chunks, 0xA000: order}
    sizes = (*x.shape, layout.tokens, layout.text_before, 1, chunk, 1)
    replay(programs, given, "order", *sizes)
    return order


def worst_spread(
    x: torch.Tensor, layout: TokenLayout, found: torch.Tensor, wanted: torch.Tensor
) -> float:
    """Spread that an order leaves over that of the definition's, of the worst head."""
    if wanted.dim() == 1:  # the grid's, for all heads
        return 1.0
    tokens = x[:, :, layout.text_before : layout.text_before + layout.tokens]
    return float((spread(tokens, found) / spread(tokens, wanted)).max())


def attended(
    programs: Programs,
    case: Case,
    tensors: tuple[torch.Tensor, ...],
    threshold: torch.Tensor,
    orders: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and route of the launches, given the orders of the keys and the queries."""
    query, key, value = (x.contiguous() for x in tensors[:3])
    out = torch.full_like(query, torch.nan)
    of_keys, of_queries = (x.long().contiguous() for x in orders)
    given = {
        0x1000: query,
        0x2000: key,
        0x3000: value,
        0x4000: threshold.contiguous(),
        0x6000: of_keys,
        0x8000: of_queries,
        0x7000: out,
    }
    queries = case.query_side
    memory, at = replay(
        programs,
        given,
        case.batch,
        case.heads,
        case.kv_heads,
        case.length,
        case.dim,
        case.sequence.tokens,
        case.before,
        0,
        64,
        1,
        0,
        query.shape[2],
        queries.tokens,
        queries.text_before,
        int(case.queries is None),
        *(x.numel() // x.shape[-1] for x in (of_keys, of_queries)),
    )
    shape = (case.batch, case.heads, -(-queries.tokens // 128), -(-case.sequence.tokens // 64))
    route = memory[at["route"] :][: math.prod(shape)].view(torch.int8).view(shape)
    return out, route


def findings(programs: Programs, case: Case, exact: bool) -> dict[str, Any]:
    """What one case shows; the program's scale is that of head dim 64."""
    tensors = (*(x.half() for x in make_tensors(case)[:3]), None)
    sides = [(tensors[1], case.sequence)]
    if case.queries is not None:
        sides.append((tensors[0], case.query_side))
    made = [ordered(programs, x, layout, case.chunk) for x, layout in sides]
    best = orders_of(case, tensors)
    wanted = [found if of is None else of for found, of in zip(made, best, strict=False)]
    budget = budget_for(case, tensors, 0.3)
    expected, split = reference_split(case, tensors, budget)
    out, route = attended(programs, case, tensors, budget, [wanted[0], wanted[-1]])
    seen = {
        "permutation": all(
            bool((order.sort(-1).values == torch.arange(layout.tokens)).all())
            for order, (_, layout) in zip(made, sides, strict=True)
        ),
        "spread": max(
            worst_spread(x, layout, found, by_definition)
            for (x, layout), found, by_definition in zip(sides, made, wanted, strict=True)
        ),
        "route": torch.equal(route, split.route),
        "out": relative(out, expected),
    }
    if exact:
        out, _ = attended(programs, case, tensors, 0 * budget, [made[0], made[-1]])
        seen["exact"] = relative(out, dense(case, tensors))
    return seen


def main() -> None:
    """The findings of all cases, a line of JSON each."""
    programs = Programs(**json.load(sys.stdin))
    for number, case in enumerate(CASES):
        print(json.dumps(findings(programs, case, number in EXACT)))


if __name__ == "__main__":
    main()
