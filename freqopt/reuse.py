"""The option `reuse_order`: orders by content are kept for several calls of a site.

An output then depends on earlier calls. Orders are kept for each module that runs the graph and
each thread, and made anew where sizes or the heads' chunks are others, where gradients are
recorded, and in a CUDA graph that the caller records.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from freqopt.capture.modules import running
from freqopt.options import Compiled
from freqopt.passes.rewrite.reuse import reusing

logger = logging.getLogger(__name__)


@dataclass
class _Kept:
    """Orders of one module's graph.

    sizes: what told how many tokens the call had that they were made in. chunks: what said how
    heads are ordered, with its version. left: calls that they still serve.
    """

    orders: list[Tensor]
    sizes: tuple[Any, ...]
    chunks: list[tuple[Tensor, int]]
    left: int

    def serves(self, sizes: tuple[Any, ...], chunks: Sequence[Tensor]) -> bool:
        """Whether a call of these sizes, by these chunks, may have them."""
        same = all(
            now is then and _version_of(now) == version
            for now, (then, version) in zip(chunks, self.chunks, strict=True)
        )
        return self.left > 0 and self.sizes == sizes and same


class _Memory(threading.local):
    """What a thread keeps, by module."""

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def compile_reusing(
    inner: Compiled, graph: fx.GraphModule, inputs: Sequence[Any], calls: int
) -> Callable[..., Any]:
    """What runs a graph whose orders serve `calls` calls: compiled twice, where it makes any.

    inner: the backend. inputs: example inputs of the graph.
    """
    both = reusing(graph)
    if both is None:
        made: Callable[..., Any] = inner(graph, inputs)
        return made
    making = inner(both.making, list(inputs))
    given = inner(both.given, [*inputs, *both.examples])
    count, memory = len(both.examples), _Memory()
    warned: list[bool] = []

    def run(*arguments: Any) -> Any:
        runner = None if _always_anew() else next(running(), None)
        if runner is None:
            if not warned and not _always_anew():
                warned.append(True)
                logger.warning(
                    "reuse_order=%d: no module runs this graph, so that nothing tells whose order "
                    "is whose; every call makes its own. Compile the model, not a function",
                    calls,
                )
            return making(*arguments)[:-count]
        sizes = tuple(_size_of(arguments[i]) for i in both.sized)
        chunks = [arguments[i] for i in both.chunks]
        kept = memory.kept.get(runner)
        if kept is not None and kept.serves(sizes, chunks):
            kept.left -= 1
            return given(*arguments, *kept.orders)
        memory.kept.pop(runner, None)
        results = making(*arguments)
        # A copy: the next run may write where this one's results lie.
        orders = [order.clone() for order in results[-count:]]
        versions = [(each, _version_of(each)) for each in chunks]
        memory.kept[runner] = _Kept(orders, sizes, versions, calls - 1)
        return results[:-count]

    return run


def _size_of(x: Any) -> Any:
    """Of a tensor, or of an argument that is a size."""
    return tuple(x.shape) if isinstance(x, Tensor) else x


def _version_of(x: Tensor) -> int:
    """How often a tensor was written; those of inference mode do not count."""
    return 0 if x.is_inference() else x._version


def _always_anew() -> bool:
    """Whether a call is one that keeps nothing and is given nothing."""
    if torch.is_grad_enabled():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
