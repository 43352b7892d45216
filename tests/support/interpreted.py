"""Triton's interpreter, quicker and with products of bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def look_once_a_helper() -> None:
    """Save a quarter of its time, for the rest of this process; results are the same.

    At every call of a helper it looks through all of triton.language for members to replace, which
    the launch around it has replaced already. Here it looks once a helper.
    """
    looking, looked = InterpretedFunction.__call__, set()

    def call(helper: InterpretedFunction, *given: Any, **named: Any) -> Any:
        if helper in looked:
            return helper.rewrite()(*given, **named)
        looked.add(helper)
        return looking(helper, *given, **named)

    InterpretedFunction.__call__ = call


def multiply_bfloat16() -> None:
    """Products of bfloat16 numbers, for the rest of this process.

    It keeps them as integers of 16 bits, and would multiply these.
    """
    multiply = InterpreterBuilder.create_dot

    def single(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(builder, single(a), single(b), *rest)

    InterpreterBuilder.create_dot = dot
