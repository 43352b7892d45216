"""The call of a model that is under way in this thread, and what it was called with.

It is on Python's stack. Where a plan is attached to the model its hooks note the beginning and the
end of each call, so that the stack is walked once a call of the model and not once a block.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from freqopt.capture.modules import CALLS, unwrapped_module

Arguments = Mapping[str, Any]

Ask = Callable[[], tuple[nn.Module | None, tuple[int, ...]]]
"""Returns the model whose call told, and what it told."""

DEEPER = 400
"""Frames between a model and a block of it, beyond which a call is taken to be over."""


class Call:
    """One call of a model that notes its calls.

    model, frame: `id` of the model, and of the frame that it runs in. told: what the call was found
    to tell, by who asked. trains: gradients may be asked for. Nothing here keeps a model or its
    arguments.
    """

    __slots__ = ("frame", "model", "told", "trains")

    def __init__(self, model: int, frame: int) -> None:
        self.model, self.frame = model, frame
        self.told: dict[object, tuple[int, ...]] = {}
        self.trains = torch.is_grad_enabled()


class _Own(threading.local):
    """Calls of this thread that are under way, the innermost last, which is `top`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.top: Call | None = None


_own = _Own()


def begin(model: nn.Module) -> None:
    """A call of a model begins. The caller of the caller runs it."""
    frame = sys._getframe(2)
    calls = _own.calls
    if calls:  # of a model around this one, or interrupted, as by Ctrl-C, which runs no hook
        there = set(frames_below(frame.f_back))
        calls[:] = [call for call in calls if call.frame in there]
    calls.append(Call(id(model), id(frame)))
    _own.top = calls[-1]


def end(model: nn.Module) -> None:
    """The call of a model that began last is over."""
    calls = _own.calls
    if calls and calls[-1].model == id(model):
        calls.pop()
    _own.top = calls[-1] if calls else None


def is_under_way() -> bool:
    """Whether a model that notes its calls is being called in this thread."""
    return _own.top is not None


def is_training() -> bool:
    """Whether gradients may be asked for of the call under way."""
    call = _own.top
    return torch.is_grad_enabled() if call is None else call.trains


def told_once(ask: Ask) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Adds what `ask` says of the call under way to the arguments of a graph.

    It is asked once in each call of a model that notes its calls; where it runs in none, every
    time. A noted call counts if its frame is on the stack, at the depth where it was last time:
    one that was interrupted may still be noted. This runs once for each block of a model.
    """
    own, frame_at = _own, sys._getframe
    key = object()
    depth = 0

    def feed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        call = own.top
        if call is not None:
            try:
                there = id(frame_at(depth)) == call.frame
            except ValueError:
                there = False
            if there and key in call.told:
                return arguments + call.told[key]
        return arguments + anew(call)

    def anew(call: Call | None) -> tuple[int, ...]:
        nonlocal depth
        if call is None:
            return ask()[1]
        for place, frame in enumerate(itertools.islice(frames_below(frame_at(1)), DEEPER)):
            if frame == call.frame:
                depth = place
                break
        else:
            return ask()[1]
        found = call.told.get(key)
        if found is None:
            model, found = ask()
            if id(model) == call.model:
                call.told[key] = found
        return found

    return feed


def frames_below(frame: FrameType | None) -> Iterator[int]:
    """Identities of a frame and of those below it."""
    while frame is not None:
        yield id(frame)
        frame = frame.f_back


def calls_under_way() -> Iterator[tuple[nn.Module, Callable[[], Arguments]]]:
    """Modules that are running in this thread, the innermost first, and how to get arguments."""
    frame, last = sys._getframe(1), None
    while frame is not None:
        if frame.f_code.co_name in CALLS:
            held = frame.f_locals
            module = held.get("self")
            if isinstance(module, nn.Module):
                module = unwrapped_module(module)
                if module is not last:
                    given = held.get("args", ()), held.get("kwargs", {})
                    yield module, functools.partial(arguments_by_name, module, *given)
                    last = module
        frame = frame.f_back  # type: ignore[assignment]


def arguments_of(model: nn.Module) -> Arguments | None:
    """The arguments of the call of a model that is under way in this thread, by name.

    None where it is not being called.
    """
    for module, arguments in calls_under_way():
        if module is model:
            return arguments()
    return None


def arguments_by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments by name and by place, whichever way they were given; ints by default too."""
    parameters = _parameters_of(type(model).forward)
    given = default_ints(model, args, kwargs) | kwargs | dict(zip(parameters, args, strict=False))
    places = {str(place): given[name] for place, name in enumerate(parameters) if name in given}
    return given | {str(place): item for place, item in enumerate(args)} | places


def default_ints(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    """The ints that a call leaves to the defaults of a model's `forward`, by name."""
    given = {*_parameters_of(type(model).forward)[: len(args)], *kwargs}
    defaults = _defaults_of(type(model).forward).items()
    return {name: number for name, number in defaults if name not in given}


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's `forward` that may be given by place."""
    own = _signature_of(forward)
    return tuple(p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD)


@functools.cache
def _defaults_of(forward: Callable[..., Any]) -> dict[str, int]:
    """The ints that arguments of a class's `forward` are by default."""
    own = _signature_of(forward)
    return {p.name: p.default for p in own if type(p.default) is int}


def _signature_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
