"""The kernels of a call, compiled several at a time before the first of them is launched.

One at a time they take a second or two each, most of it in another process (`ptxas`), so that a
first call waits for the sum of them while the other cores have nothing to do.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)

MOST_WORKERS = 16

FORMS = 1024
"""Forms that are remembered; from then on all are asked about anew, which takes a few ms each."""

_here = threading.local()
_known: set[Any] = set()
_lock = threading.Lock()


def is_compiling() -> bool:
    """Whether this thread's launches compile their kernels and do nothing else."""
    return getattr(_here, "compiling", False)


def compile_first(form: Any, run: Callable[[], object]) -> None:
    """Compile what `run` launches, unless that was done for the same form of call.

    run: allocates and launches as the call will. There are no results: what kernels would have
    written is zero, so that an operation of PyTorch may take it for places in memory, and nothing
    else may be concluded from it. Where a kernel does not compile, the call itself says so.
    """
    if is_compiling() or workers() < 2:
        return
    with _lock:
        if form in _known:
            return
        if len(_known) >= FORMS:
            _known.clear()
        _known.add(form)
    try:
        with _compiling():
            run()
    except Exception as error:
        logger.warning(
            "kernels are compiled one at a time, which takes longer: compiling several failed "
            "(%s: %s)",
            type(error).__name__,
            error,
        )


def workers() -> int:
    """Kernels that are compiled at a time."""
    own = getattr(os, "sched_getaffinity", None)
    return min(len(own(0)) if own else os.cpu_count() or 1, MOST_WORKERS)


def compiled_alone(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What compiles a kernel for the arguments that it is called with, and does not launch it."""

    def compiled(*args: Any, **kwargs: Any) -> Any:
        found = kernel.warmup(*args, grid=grid, **kwargs)
        _here.found.append(found)
        return found

    return compiled


@contextmanager
def _compiling() -> Iterator[None]:
    from triton import AsyncCompileMode

    _here.compiling, _here.found = True, []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        with ThreadPoolExecutor(workers()) as pool:
            with AsyncCompileMode(pool, ignore_errors=True), _Zeros():
                yield
            own = {id(found): found for found in _here.found}
            list(pool.map(functools.partial(_load, device=device), own.values()))
    finally:
        _here.compiling, _here.found = False, []


def _load(found: Any, device: int | None) -> None:
    """Load a kernel onto a GPU, for which Triton has a C compiler build what launches it."""
    kernel = found.result(ignore_errors=True) if hasattr(found, "result") else found
    if kernel is None or device is None:
        return
    with contextlib.suppress(Exception), torch.cuda.device(device):  # the launch will raise it too
        kernel.run  # noqa: B018


class _Zeros(TorchDispatchMode):
    """New memory holds zeros: left as it is found, it would send `gather` anywhere."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        return found.zero_() if function.overloadpacket in _ALLOCATING else found


_ALLOCATING = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
