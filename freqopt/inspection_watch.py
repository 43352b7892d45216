"""What a model does while it is inspected: where graphs break, and which modules attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from freqopt.inspection_found import FULLGRAPH, GraphBreak
from freqopt.passes.naming import plain_path
from freqopt.telling.verdict import HOOKED, by_hook

ATTENTION_FUNCTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward"}


@contextmanager
def breaks_recorded(breaks: list[GraphBreak]) -> Iterator[None]:
    """Collect in `breaks` why torch.compile left the graph while the body runs."""
    from torch._dynamo import utils

    before = len(utils.graph_break_reasons)
    skipped_before = dict(utils.counters["unimplemented"])
    yield
    known: set[tuple[str, str]] = set()
    for found in utils.graph_break_reasons[before:]:
        reason, frame = _first_line(found.reason), _user_frame(found.user_stack)
        if (reason, frame) not in known:
            known.add((reason, frame))
            hooked = by_hook(reason, list(found.user_stack or ()))
            breaks.append(GraphBreak(reason, frame, HOOKED if hooked else FULLGRAPH))
    skipped = utils.counters["unimplemented"]
    for text in [t for t in skipped if skipped[t] > skipped_before.get(t, 0)]:
        reason = _first_line(text)
        if reason not in {r for r, _ in known}:
            known.add((reason, ""))
            where = "a function that therefore runs without the compiler"
            breaks.append(GraphBreak(reason, where))


def _first_line(reason: object) -> str:
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    explanation = next((x for x in lines if x.startswith("Explanation:")), "")
    return " ".join(filter(None, [lines[0] if lines else "unknown", explanation]))


def _user_frame(stack: Sequence[Any] | None) -> str:
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "an unknown place"


@contextmanager
def compiled_forgotten(model: nn.Module) -> Iterator[None]:
    """Drop what was compiled for looking: it would count as a recompilation of the real thing.

    Before looking too: Dynamo remembers which functions it gave up, under any backend and for any
    model of the class, and would not show them.
    """
    _forget(model)
    try:
        yield
    finally:
        _forget(model)


def _forget(model: nn.Module) -> None:
    from torch._dynamo.eval_frame import remove_from_cache

    for module in model.modules():
        code = getattr(module.forward, "__code__", None)
        if code is not None:
            remove_from_cache(code)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave PyTorch's generators as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


class _Watch(TorchFunctionMode):
    """Notes the module that is running whenever attention is computed."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.found: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ATTENTION_FUNCTIONS:
            self.found[self.running[-1] if self.running else ""] = None
        return func(*args, **(kwargs or {}))


def attention_modules(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Paths of the modules that compute attention while `run` runs the model eagerly."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(enter(name))
            stack.callback(handle.remove)
            after = module.register_forward_hook(lambda *_: _leave(running), always_call=True)
            stack.callback(after.remove)
        watch = _Watch(running)
        with watch, torch.compiler.set_stance("force_eager"):
            run()
    return [plain_path(name) for name in watch.found]


def _leave(running: list[str]) -> None:
    running.pop()
