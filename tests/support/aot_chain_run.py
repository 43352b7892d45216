"""Runs the chain of one-kernel nodes node by node, as a runtime of plugins would, against the op.

Run by test_tensorrt_aot.py in a process of its own: Triton's interpreter is chosen at import.
Every node sees its inputs, its integers and fresh memory for its outputs, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from attention_cases import (
    CASES,
    Case,
    budget_for,
    make_tensors,
    reference_split,
    relative,
)
from interpreted import prepare_interpreter

from freqopt.exporters.tensorrt.aot.chain import Batch, Call, chain, element_type
from freqopt.grid import token_order
from freqopt.kernels.specialise import specialisations
from freqopt.kernels.variant import Variant

DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    prepare_interpreter()
TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
}
SMALL = {"BM": 32, "BP": 16, "BI": 16, "BJ": 32, "BD": 16, "WIDE": 16, "TILES": 1}
"""Tiles of a second tactic, where a kernel has such constants: the grid must follow."""

SHRUNK = ("attend", "disperse", "score", "probe", "estimate", "fit", "ridge", "text")


def run_chain(case: Case, call: Call, tensors: dict[str, torch.Tensor], small: bool) -> Any:
    """The tensors by name after the last node."""
    dtype = tensors["query"].dtype
    variant = Variant(90, str(dtype).removeprefix("torch."), case.dim, False)
    kernels = {given.name: given for given in specialisations(variant)}
    memory = dict(tensors)
    for step in chain(call):
        given = kernels[step.kernel]
        constants = dict(given.constants)
        if small and step.kernel in SHRUNK:
            constants.update({k: min(v, SMALL[k]) for k, v in constants.items() if k in SMALL})
        values: dict[str, Any] = {a: memory[t] for a, t in step.inputs.items()}
        for output in step.outputs:
            if output.rewrites is None:
                kind = element_type(output.argument)
                fresh = torch.empty(
                    case.batch,
                    *output.shape,
                    dtype=dtype if kind == "own" else TYPES[kind],
                    device=DEVICE,
                )
                memory[output.name] = fresh.fill_(torch.nan if fresh.is_floating_point() else 77)
            values[output.argument] = memory[output.name]
        names = given.function.arg_names
        arguments = {}
        for name in names:
            if name in constants:
                arguments[name] = constants[name]
            elif name == "scale":
                arguments[name] = case.dim**-0.5
            elif name in values:
                arguments[name] = values[name]
            else:  # a key mask, which this variant has not
                arguments[name] = step.integers.get(name, tensors["query"])
        grid = tuple(
            axis.times * case.batch
            if isinstance(axis, Batch)
            else axis
            if isinstance(axis, int)
            else -(-axis[1] // constants[axis[0]])
            for axis in step.grid
        )
        given.function[grid](**arguments, **given.options)
    return memory


def main() -> None:
    case, dtype = CASES[int(sys.argv[1])], getattr(torch, sys.argv[2])
    small = sys.argv[3] == "small"
    case = Case(**{**vars(case), "masked": False})
    query, key, value, _ = make_tensors(case)
    tensors = tuple(x.to(dtype).contiguous() for x in (query, key, value))
    budget = budget_for(case, (*tensors, None), 0.3)
    expected, split = reference_split(case, (*tensors, None), budget)
    t, h, w = case.grid
    call = Call(case.heads, case.kv_heads, case.length, case.dim, t * h * w, case.before, 0.0, 64)
    given = dict(zip(("query", "key", "value"), (x.to(DEVICE) for x in tensors), strict=True))
    given |= {
        "budget": budget.contiguous().to(DEVICE),
        "order": token_order(case.grid, torch.device(DEVICE)).long().contiguous(),
    }
    found = run_chain(case, call, given, small)
    print(
        json.dumps(
            {
                "out": relative(found["out"].cpu(), expected),
                "route": torch.equal(found["route"].cpu().to(split.route.dtype), split.route),
                "probe_error": float((found["probe_error"].cpu() - split.probe.error).abs().max()),
            }
        )
    )


if __name__ == "__main__":
    main()
