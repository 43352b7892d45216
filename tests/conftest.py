"""What every test stands on: poisoned allocations, fixed seeds, one thread, and honest skips.

Memory that a kernel allocates without writing holds NaN here (and absurd integers), so an output
that is left partly unwritten fails its test instead of passing on last call's memory.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from quick_compilers import prepare_compilers
from torch.overrides import TorchFunctionMode

torch.set_num_threads(1)

KERNELS = "freqopt.kernels."
ALLOCATORS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
MARKED = "_freqopt_poisoned"


class Poison(TorchFunctionMode):
    """Fills every allocation with NaN, or the largest value of an integer type.

    A mode of calls: one of what they dispatch took a third of a calibration's time.
    """

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]  # with its overload where an operator is called
        if name not in ALLOCATORS or out.device.type == "meta":
            return out
        if out.dtype.is_floating_point or out.dtype.is_complex:
            return out.fill_(torch.nan)
        return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)


def allocates(code: types.CodeType) -> bool:
    """Whether a function, or one defined in it, names an allocator."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return bool(ALLOCATORS & set(code.co_names)) or any(allocates(code) for code in inner)


def poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Poison():
            return function(*args, **kwargs)

    setattr(call, MARKED, True)
    return call


def poison_module(module: types.ModuleType) -> None:
    """Wrap the module's functions that allocate; the op's fake, which only allocates, is left."""
    for name, value in list(vars(module).items()):
        if (
            isinstance(value, types.FunctionType)
            and value.__module__.startswith(KERNELS)
            and not value.__module__.endswith(".op")
            and not hasattr(value, MARKED)
            and allocates(value.__code__)
        ):
            setattr(module, name, poisoned(value))


_looked_at: dict[str, types.ModuleType] = {}


@pytest.fixture(autouse=True)
def _poison_kernels() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(KERNELS) and _looked_at.get(name) is not module:
            poison_module(module)
            _looked_at[name] = module


@pytest.fixture(autouse=True)
def _no_recordings() -> None:
    """No call is launched as one of another test was, whose constants may have been others."""
    repeat = sys.modules.get(KERNELS + "repeat")
    if repeat is not None:
        repeat.REPEATER.forget()


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """The same random numbers whatever ran before, and no compiled code left for the next test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures are not drawn, which takes seconds: for tests of their words."""
    for module in ("sections", "model_sections"):
        monkeypatch.setattr(
            f"freqopt.reporting.{module}.figure_html", lambda figure, caption="", alt="": caption
        )


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs get as far as inductor, which would make C++ of them for half a minute."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda gm, inputs, **options: aot_eager(gm, inputs),
    )


def _tensorrt_missing() -> bool:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        return True
    return False


def pytest_collection_finish() -> None:
    prepare_compilers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unmet: dict[str, str] = {}
    if not torch.cuda.is_available():
        unmet["gpu"] = f"no CUDA device (torch {torch.__version__})"
    if any("tensorrt" in item.keywords for item in items) and _tensorrt_missing():
        unmet["tensorrt"] = "the TensorRT bindings are not installed"
    for item in items:
        for mark, reason in unmet.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not tested here, so that a green run on a CPU is not taken for more."""
    skipped: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason] = skipped.get(reason, 0) + 1
    if skipped:
        terminalreporter.section("not tested on this machine", yellow=True)
        for reason, count in sorted(skipped.items()):
            terminalreporter.line(f"{count:4} {reason.removeprefix('Skipped: ')}")
