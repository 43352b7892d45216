"""The chain's PTX on a GPU, launched as TensorRT launches it: inputs, integers, outputs.

All of a plugin compiled ahead of time but TensorRT itself: the driver gets the PTX of the files and
the arguments in their order, every tensor that a node makes holds NaN before.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attention_cases import relative

import freqopt.kernels.op  # noqa: F401
from freqopt.exporters.tensorrt.aot.chain import Call
from freqopt.exporters.tensorrt.aot.ptx import PLAIN_SHARED, compile_calls
from freqopt.grid import token_order
from freqopt.kernels.variant import Variant

pytestmark = pytest.mark.gpu
GRID, BEFORE, AFTER = (5, 7, 9), 7, 8
TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
}
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Driver:
    """The driver's few functions, with errors raised."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.loaded: dict[Path, Any] = {}

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} answered {code}")

    def function(self, ptx: Path, symbol: str, shared: int) -> Any:
        if ptx not in self.loaded:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            text = ctypes.c_char_p(ptx.read_bytes())
            self.call("cuModuleLoadData", ctypes.byref(module), text)
            self.call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
            if shared > PLAIN_SHARED:
                self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
            self.loaded[ptx] = function
        return self.loaded[ptx]

    def launch(self, function: Any, tactic: dict[str, Any], batch: int, values: list[Any]) -> None:
        addresses = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values)
        )
        grid = [count * (batch if batched else 1) for count, batched in tactic["grid"]]
        grid += [1] * (3 - len(grid))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call(
            "cuLaunchKernel",
            function,
            *grid,
            tactic["warps"] * 32,
            1,
            1,
            tactic["shared"],
            stream,
            addresses,
            None,
        )


def run(
    nodes: list[dict[str, Any]], folder: Path, tensors: dict[str, Any], batch: int, which: int
) -> torch.Tensor:
    """which: 0 the fast tactics, -1 the small ones."""
    driver, memory = Driver(), dict(tensors)
    for node in nodes:
        tactic = node["tactics"][which]
        inputs = [memory[name] for name in node["input_names"]]
        outputs = []
        for out in node["outputs"]:
            if out["rewrites"] is not None:
                outputs.append(inputs[out["rewrites"]])
                continue
            made = torch.empty(batch, *out["shape"], dtype=TYPES[out["type"]], device="cuda")
            outputs.append(made.fill_(torch.nan if made.is_floating_point() else 77))
        values = [ctypes.c_uint64(x.data_ptr()) for x in inputs]
        values += [ctypes.c_int32(n) for n in node["integers"]]  # type: ignore[misc]
        values += [ctypes.c_uint64(x.data_ptr()) for x in outputs]
        function = driver.function(folder / tactic["ptx"], tactic["symbol"], tactic["shared"])
        driver.launch(function, tactic, batch, values)
        memory.update(zip(node["output_names"], outputs, strict=True))
    torch.cuda.synchronize()
    found: torch.Tensor = memory["out"]
    return found


@pytest.mark.parametrize("dim", [64, 128])
def test_ptx_launched_as_tensorrt_would_is_the_op(dim: int, tmp_path: Path) -> None:
    heads, kv_heads, batch, tokens = 4, 2, 2, 315
    length = tokens + BEFORE + AFTER
    call = Call(heads, kv_heads, length, dim, tokens, BEFORE, 0.0, 64)
    about = Variant(80, "float16", dim, False)
    (nodes,) = compile_calls([(call, about, dim**-0.5)], tmp_path)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(batch, count, length, dim).half() for count in (heads, kv_heads, kv_heads)
    )
    budget = torch.full((2, heads), 0.8)
    expected = torch.ops.freqopt.split_attention(
        query, key, value, budget[0], None, list(GRID), BEFORE, AFTER, dim**-0.5, 0.0, 64
    )[0]
    order = token_order(GRID, torch.device("cpu")).long().contiguous()
    given = {"query": query, "key": key, "value": value, "budget": budget, "order": order}
    torch.cuda.init()
    on_gpu = {name: x.cuda() for name, x in given.items()}
    for which in (0, -1):
        found = run(nodes, tmp_path, on_gpu, batch, which).cpu()
        assert relative(found, expected) < 5e-3, "fast" if which == 0 else "small"
