"""Triton's interpreter without what it does over and over: a quarter of its time.

At every call of a helper it looks through all of triton.language for members to replace, which the
launch around it has replaced already. Here it looks once a helper.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import InterpretedFunction


def look_once_a_helper() -> None:
    """For the rest of this process; results are the same."""
    looking, looked = InterpretedFunction.__call__, set()

    def call(helper: InterpretedFunction, *given: Any, **named: Any) -> Any:
        if helper in looked:
            return helper.rewrite()(*given, **named)
        looked.add(helper)
        return looking(helper, *given, **named)

    InterpretedFunction.__call__ = call
