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
    CONTENT_CASES,
    RECTANGULAR_CASES,
    Case,
    budget_for,
    dense,
    make_tensors,
    orders_of,
    reference_split,
    relative,
)
from interpreted import look_once_a_helper
from ort_programs import Programs

from freqopt.kernels.content_order import spread
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.specialise import NATIVE, POINTERS, specialisations
from freqopt.kernels.variant import Variant

look_once_a_helper()
ABOUT = Variant(86, "float32", 32, False, content=True)
TYPES = {
    "*fp32": torch.float32, "*fp16": torch.float16, "*i64": torch.int64, "*i32": torch.int32,
    "*i8": torch.int8, "*i1": torch.bool,
}  # fmt: skip
WORKSPACE, PROGRAMS_SCALE = 0x100000, 0.125
CASES = [
    Case(**{**vars(CONTENT_CASES[0]), "masked": False}),
    Case(**{**vars(CONTENT_CASES[1]), "dim": 32}),
    Case(**{**vars(RECTANGULAR_CASES[0]), "masked": False}),
    Case(**{**vars(RECTANGULAR_CASES[2]), "query_before": 2, "query_after": 3}),
]


def replay(
    programs: Programs, given: dict[int, torch.Tensor], *arguments: object
) -> tuple[torch.Tensor, dict[str, int]]:
    """Run the launches of a call; given: the tensors at its made-up addresses.

    Returns the workspace (bytes,) uint8, and where its tensors lie.
    """
    lines = programs.run(*arguments, capability=86, FAKE_IMAGES="1")  # type: ignore[arg-type]
    failed = [line for line in lines if line[0] == "error"]
    assert not failed, failed
    kernels = {s.name: s for s in specialisations(ABOUT)}
    names = {line[1]: line[2] for line in lines if line[0] == "cubin"}
    size = next(int(line[1]) for line in lines if line[0] == "bytes")
    memory = torch.full((size,), 0x7F, dtype=torch.uint8)

    def tensor(name: str, at: int) -> torch.Tensor:
        if at < WORKSPACE:
            return given[at]
        kind = torch.float32 if name in NATIVE else TYPES[POINTERS[name]]
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
    sizes = (*x.shape, layout.tokens, layout.text_before, 1, chunk, 0)
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
    programs: Programs, case: Case, tensors: tuple[torch.Tensor, ...], threshold: torch.Tensor,
    orders: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output and route of the launches, given the orders of the keys and the queries."""
    query, key, value = (x.contiguous() for x in tensors[:3])
    out = torch.full_like(query, torch.nan)
    of_keys, of_queries = (x.long().contiguous() for x in orders)
    given = {
        0x1000: query * case.dim**-0.5 / PROGRAMS_SCALE, 0x2000: key, 0x3000: value,
        0x4000: threshold.contiguous(), 0x6000: of_keys, 0x8000: of_queries, 0x7000: out,
    }  # fmt: skip
    queries = case.query_side
    memory, at = replay(
        programs, given, case.batch, case.heads, case.kv_heads, case.length, case.dim,
        case.sequence.tokens, case.before, 0, 64, 0, 0,
        query.shape[2], queries.tokens, queries.text_before, int(case.queries is None),
        *(x.numel() // x.shape[-1] for x in (of_keys, of_queries)),
    )  # fmt: skip
    shape = (case.batch, case.heads, -(-queries.tokens // 128), -(-case.sequence.tokens // 64))
    route = memory[at["route"] :][: math.prod(shape)].view(torch.int8).view(shape)
    return out, route


def main() -> None:
    """The findings of one case, as JSON."""
    programs = Programs(**json.load(sys.stdin))
    case = CASES[int(sys.argv[1])]
    tensors = make_tensors(case)
    sides = [(tensors[1], case.sequence)]
    if case.queries is not None:
        sides.append((tensors[0], case.query_side))
    made = [ordered(programs, x, layout, case.chunk) for x, layout in sides]
    wanted = [found if best is None else best
              for found, best in zip(made, orders_of(case, tensors), strict=False)]  # fmt: skip
    budget = budget_for(case, tensors, 0.3)
    expected, split = reference_split(case, tensors, budget)
    out, route = attended(programs, case, tensors, budget, [wanted[0], wanted[-1]])
    exact, _ = attended(programs, case, tensors, 0 * budget, [made[0], made[-1]])
    numbers = [torch.arange(layout.tokens) for _, layout in sides]
    spreads = [
        worst_spread(x, layout, found, best)
        for (x, layout), found, best in zip(sides, made, wanted, strict=True)
    ]
    found = {
        "permutation": all(
            bool((order.sort(-1).values == every).all())
            for order, every in zip(made, numbers, strict=True)
        ),
        "spread": max(spreads),
        "route": torch.equal(route, split.route),
        "out": relative(out, expected),
        "exact": relative(exact, dense(case, tensors)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
