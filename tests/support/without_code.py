"""Compiles kernels as far as the shared memory that they need: what ptxas makes is left out.

Of wide heads it is most of the time, and shared memory is laid out before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

from freqopt.kernels.specialise import Specialised, compile_specialised
from freqopt.kernels.variant import Variant


def shared_by(given: Specialised, variant: Variant) -> int:
    """Bytes of shared memory of a kernel; errors as of `compile_specialised`."""
    with only_memory():
        shared: int = compile_specialised(given, variant).metadata.shared
    return shared


@contextmanager
def only_memory(wanted: bool = True) -> Iterator[None]:
    """What is compiled inside has its shared memory and no code."""
    before = knobs.runtime.add_stages_inspection_hook
    if wanted:
        knobs.runtime.add_stages_inspection_hook = _without_code
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def _without_code(*given: Any) -> tuple[str, str]:
    """Triton's hook: asked with nothing it names what is made, so that no cache confuses them."""
    if given:
        _, stages, *_ = given
        stages["ptx"] = lambda module, metadata: metadata.update(name="nothing") or ""
        stages["cubin"] = lambda module, metadata: b""
    return "without code", "without code"
