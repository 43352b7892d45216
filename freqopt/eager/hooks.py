"""Hooks that tell what serves a model that it is called, and which of its modules is running.

They are functions, the same for all models, and find what serves on the module, so that copies and
pickles of a model are served by nobody. What was begun is ended by the hooks that come for it: they
go by what is under way in the thread, as the model may be served anew, or no more, by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from freqopt.capture.looking import is_looking
from freqopt.capture.modules import OwnOnly
from freqopt.capture.repeated import in_backward
from freqopt.eager.by_hand import PutOff, computed
from freqopt.eager.calling import Call, under_way
from freqopt.telling.copies import tell_of_copy

BEGINS, ENDS, ENTERS, LEAVES = -20_260_010, -20_260_011, -20_260_012, -20_260_013
"""Keys of our hooks, which no hook of another's has."""

SERVER = "freqopt_server"
"""Attribute of the model, and of its attention modules, for what serves them."""


class Server(Protocol):
    """What serves a model, as hooks know it: `freqopt.eager.serve`."""

    root: nn.Module
    stopped: bool

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that have planned attention."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model begins."""

    def begin_again(self) -> None:
        """A part of a call begins again, in a backward pass."""

    def enter(self, call: Call, module: nn.Module) -> None:
        """A module with planned attention begins to run in a call."""

    def leave(self, call: Call, module: nn.Module, *, failed: bool) -> None:
        """It is left."""

    def end(self, *, failed: bool) -> None:
        """The innermost call is over."""

    def called_outside(self, module: nn.Module) -> None:
        """A module with planned attention is called in no call of the model."""


def serve_by(server: Server) -> None:
    """Have a model's calls served from the next one on."""
    root = server.root
    _hook(root, BEGINS, ENDS, _begin, _end)
    hooks: Any = root._forward_hooks
    hooks.move_to_end(ENDS, last=False)  # before it is told what was split
    for module in server.modules:  # which hold the model by nothing, or it would never be freed
        module.__dict__[SERVER] = OwnOnly(weakref.ref(server))
        _hook(module, ENTERS, LEAVES, _enter, _leave)
    root.__dict__[SERVER] = OwnOnly(server)  # the model may be a module of attention itself


def unserve(modules: Iterable[nn.Module], server: Server | None = None) -> None:
    """Serve modules no more; of a copy, take off what it has of the original. Once is enough.

    server: what they are served by, for those that are not served by another by now.
    """
    for module in modules:
        if SERVER in module.__dict__ and (server is None or _server_of(module) is server):
            _unhook(module, BEGINS, ENDS)
            _unhook(module, ENTERS, LEAVES)
            module.__dict__.pop(SERVER, None)


def _server_of(module: nn.Module) -> Server | None:
    held = module.__dict__.get(SERVER)
    found: Any = held.held if isinstance(held, OwnOnly) else None
    server: Server | None = found() if isinstance(found, weakref.ref) else found
    return server


# Another thread may take a hook off when PyTorch is about to call it, then without the keywords.


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    if torch.compiler.is_compiling() or is_looking() or kwargs is None:
        return
    server = _server_of(module)
    if server is None:
        tell_of_copy(module)
    else:
        server.begin(args, kwargs)


def _end(module: nn.Module, args: Any, *given: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    output = given[-1]
    server: Any = under_way.stack[-1][0] if under_way.stack else None
    if server is not None and server.root is module and not is_looking():
        server.end(failed=output is None)
    held = any(isinstance(leaf, PutOff) for leaf in pytree.tree_leaves(output))
    return computed(output) if held else None


def _enter(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    if torch.compiler.is_compiling():
        return
    server = _server_of(module)
    if server is None:
        return
    if under_way.call_of(server) is None and in_backward():
        server.begin_again()
    if (call := under_way.call_of(server)) is not None:
        server.enter(call, module)
    elif not (in_backward() or is_looking() or server.stopped):
        server.called_outside(module)
        under_way.outside.append(id(module))


def _leave(module: nn.Module, args: Any, *given: Any) -> None:
    if torch.compiler.is_compiling():
        return
    server: Any
    server, call = under_way.stack[-1] if under_way.stack else (None, None)
    if call is not None and any(each.module is module for each in call.stack):
        server.leave(call, module, failed=given[-1] is None)
    elif under_way.outside and under_way.outside[-1] == id(module):
        under_way.outside.pop()


def _hook(module: nn.Module, before: int, after: int, pre: Any, post: Any) -> None:
    module._forward_pre_hooks[before] = pre
    module._forward_pre_hooks_with_kwargs[before] = True
    module._forward_hooks[after] = post
    module._forward_hooks_with_kwargs[after] = True
    module._forward_hooks_always_called[after] = True


def _unhook(module: nn.Module, before: int, after: int) -> None:
    module._forward_pre_hooks.pop(before, None)
    module._forward_pre_hooks_with_kwargs.pop(before, None)
    module._forward_hooks.pop(after, None)
    module._forward_hooks_with_kwargs.pop(after, None)
    module._forward_hooks_always_called.pop(after, None)
