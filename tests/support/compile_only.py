"""Compiles the Triton kernels of one call for a GPU that is not there.

Stands in for a kernel at launch: turns the actual arguments into a signature and runs Triton's own
compiler with ptxas for the given compute capability. Nothing is executed, so what follows in the
host code sees uninitialised buffers; only shapes and launches are real.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
    torch.int64: "*i64",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


class CompileOnly:
    """Has a kernel's launch syntax; compiles instead of launching and remembers the results."""

    def __init__(self, kernel: Any, capability: int, compiled: dict[str, Any]) -> None:
        self.kernel, self.capability, self.compiled = kernel, capability, compiled

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in LAUNCH_OPTIONS if k in kwargs}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            unset = {p.name: p.default for p in self.kernel.params if p.name not in given}
            values = {name: (given | unset)[name] for name in self.kernel.arg_names}
            constexprs = {p.name for p in self.kernel.params if p.is_constexpr} | set(unset)
            signature, constants, attributes = {}, {}, {}
            for i, (name, value) in enumerate(values.items()):
                if name in constexprs or value is None or (isinstance(value, int) and value == 1):
                    signature[name], constants[name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[name] = TYPES[value.dtype]
                    attributes[(i,)] = [["tt.divisibility", 16]]
                elif isinstance(value, float):
                    signature[name] = "fp32"
                else:
                    signature[name] = "i32"
                    if value % 16 == 0:
                        attributes[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, constants, attributes)
            target = GPUTarget("cuda", self.capability, 32)
            self.compiled[self.kernel.__name__] = triton.compile(
                source, target=target, options=options
            )

        return launch
