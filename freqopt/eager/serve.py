"""Serves the attention of a model in eager mode, at the modules that a plan names.

`freqopt.attach` keeps the budgets on the modules, those of each call's timestep. While such a
module runs, calls of attention in it are answered by the op; nothing else of it is touched.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from freqopt.capture.budgets import attribute_of
from freqopt.capture.looking import is_looking
from freqopt.capture.modules import OwnOnly, names_of, running
from freqopt.capture.repeated import Pending, in_backward
from freqopt.capture.under_way import arguments_by_name, frames_below
from freqopt.eager.again import Again, in_checkpoint
from freqopt.eager.asked import Asked, AskedByHand, may_be_attention
from freqopt.eager.by_hand import PRODUCTS, PutOff, computed, ends, tensors_in
from freqopt.eager.calling import Call, Running, share_of, under_way
from freqopt.eager.calls import Served, serve
from freqopt.eager.forms import MOST_FORMS, MOST_LOOKS, Form, Forms, Look, Wanted
from freqopt.eager.latest import Latest
from freqopt.eager.lay import Lay, believed
from freqopt.eager.telling import Split, Told
from freqopt.eager.waiting import Waiting
from freqopt.errors import SiteError
from freqopt.passes.naming import site_name
from freqopt.passes.nodes import is_distributed
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Known
from freqopt.plan.identity import class_name_of
from freqopt.regional import Attached
from freqopt.selecting import own_budget
from freqopt.telling.copies import tell_of_copy
from freqopt.telling.said import warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

BEGINS, ENDS, ENTERS, LEAVES = -20_260_010, -20_260_011, -20_260_012, -20_260_013
"""Keys of our hooks, which no hook of another's has."""

NOT_SERVED = object()

SERVER = "freqopt_server"
"""Attribute of the model, and of its attention modules, for what serves them."""


@dataclass(frozen=True)
class Place:
    """An attention that a plan splits: its site in the plan, its name in the model, and its module.

    known: layouts that the plan has. content: whether a head's tokens are ordered by content.
    """

    site: str
    name: str
    module: nn.Module
    nth: int
    known: tuple[Known, ...]
    content: bool

    @property
    def budget(self) -> Tensor | None:
        """(2, H), of the timestep under way; None when it was taken off while a call is."""
        return self.module.__dict__.get(attribute_of(self.nth))


class Server:
    """What serves a model that a plan is attached to, from `start` to `stop`.

    strict: raise where a planned attention cannot be split.
    """

    def __init__(self, attached: Attached, plan: Plan, *, strict: bool = False) -> None:
        self.root, self.plan = attached.root, plan
        self.names = names_of(self.root)
        self.places: dict[tuple[str, int], Place] = {}
        for site, (module, nth) in attached.places.items():
            if plan.sites[site].decision == "split":
                name, content = self.names[id(module)], any(plan.sites[site].chunks)
                self.places[name, nth] = Place(
                    site, site_name(name, 0, nth), module, nth, plan.known(site), content
                )
        self.forms = Forms(self.root, plan, {p.name: p.known for p in self.places.values()})
        self.told = Told(self.root, plan, strict=strict)
        self.largest_chunk = max((plan.largest_chunk(site) for site in plan.sites), default=0)
        self.trained: Pending[Form] = Pending()
        self._is_told = False
        self._served: Latest[Served | Why] = Latest(MOST_FORMS, "forms of attention")
        self._attention: Latest[bool] = Latest(MOST_FORMS, "forms of calls that may be attention")
        self.waiting = Waiting(MOST_FORMS)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that have planned attention."""
        return list(dict.fromkeys(place.module for place in self.places.values()))

    def start(self) -> None:
        """Serve from the next call on."""
        _hook(self.root, BEGINS, ENDS, _begin, _end)
        hooks: Any = self.root._forward_hooks
        hooks.move_to_end(ENDS, last=False)  # before it is told what was split
        for module in self.modules:  # which hold the model by nothing, or it would never be freed
            module.__dict__[SERVER] = OwnOnly(weakref.ref(self))
            _hook(module, ENTERS, LEAVES, _enter, _leave)
        self.root.__dict__[SERVER] = OwnOnly(self)  # the model may be a module of attention itself

    def stop(self) -> None:
        """Serve no more; once is enough. A call that is under way goes on dense."""
        unserve((self.root, *self.modules))
        while any(server is self for server, _ in under_way.stack):
            self._close_last()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model begins. The caller of the caller runs it."""
        frame = sys._getframe(2)
        self._drop_interrupted(frame)
        form = self.forms.of(args, kwargs)
        look = None
        if form.again and form.looks < MOST_LOOKS and not _is_transformed():
            look = Look(self.forms, form, self.names, args, kwargs)
        arguments = arguments_by_name(self.root, args, kwargs)
        if torch.is_grad_enabled() and not in_backward():
            self.trained.note(form)
        under_way.stack.append((self, Call(arguments, form, look, frame=id(frame))))

    def begin_again(self) -> None:
        """A part of a call from before begins, in a backward pass."""
        forms = self.trained.again()
        if forms:
            again = Again(self.plan.model.class_name, forms)
            under_way.stack.append((self, Call({}, again.form, None, again)))

    def _drop_interrupted(self, frame: FrameType) -> None:
        """Close what a call left open that was interrupted from the keyboard.

        Such a call is on Python's stack no more; one around this one is below the frame that runs
        this one, which itself may be where the interrupted one's was.
        """
        if not under_way.stack:
            return
        there = set(frames_below(frame.f_back))
        while any(server is self and call.frame not in there for server, call in under_way.stack):
            self._close_last()

    @staticmethod
    def _close_last() -> None:
        _, call = under_way.stack.pop()
        call.leave()
        if call.look is not None:
            call.look.abandon()

    def called_outside(self, module: nn.Module) -> None:
        """A module with planned attention is called in no call of the model, and is dense.

        Raises:
            SiteError: under `strict`.
        """
        message = (
            f"{class_name_of(self.root)}: attention at {self.names[id(module)] or 'the model'} was "
            "called in no call of the model (as by model.forward(...), a block alone, or in "
            "another thread), and is dense there: call the model itself"
        )
        if self.told.compiled.settings.strict:
            under_way.outside -= 1
            raise SiteError(message)
        if not self._is_told:
            self._is_told = True
            warn(message)

    def end(self, *, failed: bool) -> None:
        """A call of the model is over."""
        if not under_way.stack or under_way.stack[-1][0] is not self:
            return
        _, call = under_way.stack.pop()
        call.leave()  # the model itself, where it holds attention: its other hook comes after this
        if call.look is not None:
            call.look.abandon() if failed else call.look.close()
        if call.split and not failed:
            self.told.split(call.split)

    def attend(self, asked: Asked) -> Any:
        """What a call that may be attention returns, or NOT_SERVED."""
        call = under_way.stack[-1][1]
        found = self._attention.get(asked.form)
        if found is None:
            found = self._attention.put(asked.form, asked.is_attention())
        if not found or not self._is_innermost(call.stack[-1].module):
            return NOT_SERVED  # or it is in a module inside that the plan does not name
        running_now = call.stack[-1]
        name, nth = self.names[id(running_now.module)], running_now.met
        running_now.met += 1
        place = self.places.get((name, nth))
        given = None if place is None else place.budget
        if place is None or given is None:
            return NOT_SERVED
        if _is_transformed():
            self.told.dense(place.site, Reason.TRANSFORMED())
            return NOT_SERVED
        node = None
        if call.look is not None:
            node = call.look.begin(asked.function, asked.args, asked.kwargs, asked.example())
        lay = self._lay(call, place, asked)
        again = call.again
        budget = share_of(given if again is None else own_budget(given))
        serving = lay if isinstance(lay, Why) else self._serving(asked, lay, budget)
        if isinstance(lay, Lay):
            self.told.compiled.grids.add(lay.grid)
        if isinstance(serving, Why):
            self.told.dense(place.site, serving)
            result = asked.plainly()
        else:
            result, density, error = serving(asked.tensors, budget.to(asked.tensors[0].device))
            if again is None:
                call.split.append(Split(place.site, given, density, error))
        if call.look is not None and node is not None:
            call.look.writer.end(node, result)
        return result

    def meet(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a call returns that is attention or part of it, or NOT_SERVED."""
        if may_be_attention(function):
            return self.attend(Asked(function, args, kwargs))
        if _is_transformed():
            return NOT_SERVED  # what is put off may be asked for when the transform is over
        call = under_way.stack[-1][1]
        running_now, name = call.stack[-1], getattr(function, "__name__", "")
        if name in PRODUCTS and ends(args, kwargs):
            return self.attend(AskedByHand(function, args, kwargs))
        if name in PRODUCTS and not self._is_innermost(running_now.module):
            return NOT_SERVED
        found = self.waiting.put_off(function, args, kwargs, running_now.put_off)
        if found is None:
            return NOT_SERVED
        if call.look is not None and all(found is not t for t in tensors_in(args, kwargs)):
            call.look.writer.end(call.look.begin(function, args, kwargs, found), found)
        return found

    def _is_innermost(self, module: nn.Module) -> bool:
        """Whether no other module of the model is running inside a module."""
        inner = next(self._running(), None)
        return inner is not None and self.names[id(inner)] == self.names[id(module)]

    def _running(self) -> Iterator[nn.Module]:
        """Modules of the model that are running, the innermost first."""
        return (module for module in running() if id(module) in self.names)

    def _lay(self, call: Call, place: Place, asked: Asked) -> Lay | Why:
        """How the tokens of an attention lie in this call of tensors."""
        if any(is_distributed(tensor) for tensor in asked.tensors):
            return Reason.DISTRIBUTED()
        if call.trains and in_checkpoint(place.module):
            return Reason.CHECKPOINT_INSIDE()
        kind = (place.known, place.content, asked.form)
        if call.again is not None:
            return call.again.lay(kind) or Reason.NO_AXES()
        lay = call.form.lays.get(kind)
        if lay is None and call.look is not None:
            lay = call.look.find(Wanted(place.name, kind, place.content))
            call.form.lays.put(kind, lay)
        if lay is None:  # as it was skipped when the form was looked at
            call.form.again = True
            lay = believed(place.known, call.arguments, asked.queries, asked.keys)
        return lay or Reason.NO_AXES()

    def _serving(self, asked: Asked, lay: Lay, budget: Tensor) -> Served | Why:
        """What serves such calls, made once."""
        heads = budget.shape[-1]
        key = (asked.form, lay, heads)
        found = self._served.get(key)
        if found is None:
            found = self._served.put(key, serve(asked, lay, heads, self.largest_chunk))
        return found


class _Serving(TorchFunctionMode):
    """Answers attention while a module with planned attention runs."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_innermost():
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            found = self.server.meet(func, args, kwargs)
        return func(*args, **kwargs) if found is NOT_SERVED else found

    def _is_innermost(self) -> bool:
        """Whether no other module with planned attention runs inside; what it left comes here."""
        stack = under_way.stack[-1][1].stack if under_way.stack else []
        return bool(stack) and stack[-1].mode is self


def _is_transformed() -> bool:
    """Whether a transform of torch.func, or torch.jit.trace, is under way."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(torch._C._get_tracing_state())


def _server_of(module: nn.Module) -> Server | None:
    held = module.__dict__.get(SERVER)
    found = held.held if isinstance(held, OwnOnly) else None
    found = found() if isinstance(found, weakref.ref) else found
    return found if isinstance(found, Server) else None


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or is_looking():
        return
    server = _server_of(module)
    if server is None:
        tell_of_copy(module)
    else:
        server.begin(args, kwargs)


def _end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    server = _server_of(module)
    if server is not None:
        server.end(failed=output is None)
    held = any(isinstance(leaf, PutOff) for leaf in pytree.tree_leaves(output))
    return computed(output) if held else None


def _enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    server = _server_of(module)
    if server is not None and not under_way.stack and in_backward():
        server.begin_again()
    if server is not None and not (under_way.stack or in_backward() or is_looking()):
        under_way.outside += 1
        server.called_outside(module)
    if server is None or not under_way.stack or under_way.stack[-1][0] is not server:
        return
    mode: Any = _Serving(server)
    mode.__enter__()
    under_way.stack[-1][1].stack.append(Running(module, mode))


def _leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    server = _server_of(module)
    if not under_way.stack and under_way.outside:
        under_way.outside -= 1
    if server is None or not under_way.stack or under_way.stack[-1][0] is not server:
        return
    call = under_way.stack[-1][1]
    if any(each.module is module for each in call.stack):
        call.leave(module)
    if call.again is not None and not call.stack:
        under_way.stack.pop()


def unserve(modules: Iterable[nn.Module]) -> None:
    """Serve modules no more; of a copy, take off what it has of the original. Once is enough."""
    for module in modules:
        if SERVER in module.__dict__:
            _unhook(module, BEGINS, ENDS)
            _unhook(module, ENTERS, LEAVES)
            del module.__dict__[SERVER]


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
