"""Serves the attention of a model in eager mode, at the modules that a plan names.

`freqopt.attach` keeps the budgets on the modules, those of each call's timestep. While such a
module runs, calls of attention in it are answered by the op; nothing else of it is touched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freqopt.capture.budgets import attribute_of
from freqopt.capture.modes import is_transformed
from freqopt.capture.modules import names_of, running
from freqopt.capture.repeated import Pending
from freqopt.capture.under_way import arguments_by_name
from freqopt.eager.again import Again, in_checkpoint
from freqopt.eager.asked import Asked, AskedByHand, may_be_attention
from freqopt.eager.by_hand import PRODUCTS, ends, tensors_in
from freqopt.eager.calling import Call, Running, frames_of_all, share_of, under_way
from freqopt.eager.calls import Served, serve
from freqopt.eager.forms import MOST_FORMS, MOST_LOOKS, Form, Forms, Look, Wanted
from freqopt.eager.hooks import serve_by, unserve
from freqopt.eager.latest import Latest
from freqopt.eager.lay import Kind, Lay, as_others, believed, is_elsewhere, is_told
from freqopt.eager.masks import Masks
from freqopt.eager.telling import Split, Told
from freqopt.eager.waiting import Waiting
from freqopt.passes.naming import site_name
from freqopt.passes.nodes import is_distributed
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Known
from freqopt.regional import Attached
from freqopt.selecting import own_budget
from freqopt.telling.gone import Presence
from freqopt.telling.verdict import say_outside

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

NOT_SERVED = object()

WORK = PRODUCTS | {"linear", "softmax"}
"""Functions that a module calls where it attends, and does not where a step cache skips it."""


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

    strict: raise where a planned attention cannot be split. stopped: calls that are under way go on
    dense, and no more are served.
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
        placed = {place.site: place.module for place in self.places.values()}
        self._presence = Presence(self.root, placed)
        self._within: dict[int, list[Place]] = {}
        for place in self.places.values():
            self._within.setdefault(id(place.module), []).append(place)
        self.told = Told(self.root, plan, strict=strict)
        self.largest_chunk = max((plan.largest_chunk(site) for site in plan.sites), default=0)
        self.trained: Pending[Form] = Pending()
        self.stopped = self._is_told = False
        self._open: list[Call] = []
        self._lock = threading.Lock()
        self._served: Latest[Served | Why] = Latest(MOST_FORMS, "forms of attention")
        self._attention: Latest[bool] = Latest(MOST_FORMS, "forms of calls that may be attention")
        self.waiting = Waiting(MOST_FORMS)
        self.masks = Masks(MOST_FORMS)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that have planned attention."""
        return list(dict.fromkeys(place.module for place in self.places.values()))

    def start(self) -> None:
        """Serve from the next call on."""
        serve_by(self)

    def stop(self) -> None:
        """Serve no more; once is enough. A call that is under way in any thread goes on dense.

        Its hooks stay until it is over, as nothing else can close it: its modes are of its thread,
        below those of models that are called in it.
        """
        under_way.drop_interrupted(sys._getframe(1))
        with self._lock:
            self.stopped = True
            self._is_over()

    def _is_over(self) -> bool:
        """Whether it serves no more and no call is under way; its hooks are off then."""
        if not self.stopped:
            return False
        there = frames_of_all()
        self._open = [call for call in self._open if call.frame in there]
        if not self._open:
            unserve((self.root, *self.modules), self)
        return not self._open

    def _opened(self, call: Call) -> bool:
        """Note that a call is under way; False where the hooks that would end it are off by now."""
        with self._lock:
            if self._is_over():
                return False
            self._open.append(call)
        under_way.stack.append((self, call))
        return True

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model begins. The caller of the caller runs it."""
        frame = sys._getframe(2)
        under_way.drop_interrupted(frame.f_back)
        if self.stopped:
            self._opened(Call({}, Form(), frame=id(frame)))
            return
        form = self.forms.of(args, kwargs)
        call = Call(arguments_by_name(self.root, args, kwargs), form, frame=id(frame))
        if not self._opened(call):
            return
        if form.again and form.looks < MOST_LOOKS and not is_transformed():
            call.look = Look(self.forms, form, self.names, args, kwargs)
        if call.repeats:
            self.trained.again()
        elif call.trains and self.trained.note(form):
            form.decided.clear()

    def begin_again(self) -> None:
        """A part of a call begins again, in a backward pass. The caller of the caller runs it."""
        forms = [] if self.stopped else self.trained.again()
        if forms:
            again = Again(self.plan.model.class_name, forms)
            self._opened(Call({}, again.form, again=again, frame=id(sys._getframe(2))))

    def enter(self, call: Call, module: nn.Module) -> None:
        """A module with planned attention begins to run in a call."""
        call.entered.add(id(module))
        mode: Any = _Serving(self)
        mode.__enter__()
        call.stack.append(Running(module, mode))

    def leave(self, call: Call, module: nn.Module, *, failed: bool) -> None:
        """It is left. A part of a call from before is over with it."""
        if not failed:
            self._look_back(call, module)
        call.leave(module)
        if call.again is not None and not call.stack:
            self._close(call, failed=failed)

    def _close(self, call: Call, *, failed: bool) -> None:
        """The innermost call is over.

        PyTorch is going through the hooks of one that failed, so that they stay until the next.
        """
        under_way.stack.pop()
        with self._lock:
            self._open = [each for each in self._open if each is not call]
            if not failed:
                self._is_over()

    def called_outside(self, module: nn.Module) -> None:
        """A module with planned attention is called in no call of the model, and is dense.

        Raises:
            SiteError: under `strict`.
        """
        strict = self.told.compiled.settings.strict
        say_outside(self.root, self.names[id(module)], again=self._is_told, strict=strict)
        self._is_told = True

    def end(self, *, failed: bool) -> None:
        """The innermost call, which is one of the model, is over."""
        call = under_way.stack[-1][1]
        if not failed:
            self._look_back(call, self.root)
            call.dense |= dict.fromkeys(self._replaced(call), Reason.REPLACED())
        call.leave()  # the model itself, where it holds attention: its other hook comes after this
        self._close(call, failed=failed)
        if failed or self.stopped:
            call.abandon()
            return
        if call.look is not None:
            call.look.close()
            call.form.again = call.form.again or bool(self._skipped(call))
        if call.split:
            self.told.split(call.split)
        if call.dense:
            self.told.missed(call.dense)

    def _look_back(self, call: Call, module: nn.Module) -> None:
        """A module is about to be left: note its planned attention that was not met in it."""
        ran = next((each for each in reversed(call.stack) if each.module is module), None)
        if ran is None or not ran.works or call.again is not None:
            return
        for place in self._within[id(module)]:
            if place.nth >= ran.met and place.budget is not None:
                call.dense.setdefault(place.site, Reason.NOT_CALLED())

    def _replaced(self, call: Call) -> list[str]:
        """Sites whose modules did not run in a call, as the model has them no more."""
        if all(id(module) in call.entered for module in self.modules):
            return []
        gone = set(self._presence.gone())
        return [
            place.site
            for place in self.places.values()
            if place.site in gone
            and id(place.module) not in call.entered
            and place.budget is not None
        ]

    def _skipped(self, call: Call) -> set[str]:
        """Sites that a call has told nothing of, as a step cache skipped them."""
        told = {each.site for each in call.split} | call.dense.keys()
        wanted = {place.site for place in self.places.values() if place.budget is not None}
        return wanted - told

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
        if is_transformed():
            self._stays_dense(call, place, Reason.TRANSFORMED())
            return NOT_SERVED
        node = None
        if call.look is not None:
            node = call.look.begin(asked.function, asked.args, asked.kwargs, asked.example())
        lay = self._lay(call, place, asked)
        if isinstance(lay, Lay):
            lay = self.masks.checked(asked, lay)
        again = call.again
        budget = share_of(given if again is None else own_budget(given))
        serving = lay if isinstance(lay, Why) else self._serving(asked, lay, budget)
        if isinstance(lay, Lay):
            self.told.grid(place.site, lay.grid, asked.keys)
        if isinstance(serving, Why):
            self._stays_dense(call, place, serving)
            result = asked.plainly()
        else:
            result, density, error = serving(asked.tensors, budget.to(asked.tensors[0].device))
            if again is None:
                call.split.append(Split(place.site, given, density, error))
        if call.look is not None and node is not None:
            call.look.writer.end(node, result)
        return result

    def _stays_dense(self, call: Call, place: Place, why: Why) -> None:
        self.told.dense(place.site, why)
        if call.again is None:
            call.dense[place.site] = why

    def meet(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a call returns that is attention or part of it, or NOT_SERVED."""
        if may_be_attention(function):
            return self.attend(Asked(function, args, kwargs))
        call = under_way.stack[-1][1]
        running_now, name = call.stack[-1], getattr(function, "__name__", "")
        running_now.works = running_now.works or name in WORK
        if is_transformed():
            return NOT_SERVED  # what is put off may be asked for when the transform is over
        if name in PRODUCTS and ends(args, kwargs):
            return self.attend(AskedByHand(function, args, kwargs))
        if name in PRODUCTS and not self._is_innermost(running_now.module):
            return NOT_SERVED
        if name in PRODUCTS and call.trains and not torch.is_grad_enabled() and in_checkpoint():
            return NOT_SERVED  # it runs once more where gradients are wanted, and is dense there
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
        sizes = (*asked.tensors[0].shape, asked.keys)
        kind = Kind(place.known, place.content, sizes, asked.form)
        if call.again is not None:
            return call.again.lay(kind) or Reason.NO_AXES()
        lay = self._found(call, place, asked, kind)
        # What runs in the backward pass has to be what ran, even where more is known by then.
        if call.repeats:
            return call.form.decided.get(kind) or lay
        if call.trains and in_checkpoint():
            return call.form.decided.get(kind) or call.form.decided.put(kind, lay)
        return lay

    def _found(self, call: Call, place: Place, asked: Asked, kind: Kind) -> Lay | Why:
        """How the tokens of an attention lie, from what is known of calls of this form."""
        form = call.form
        lay = form.lays.get(kind)
        if lay is None and call.look is not None:
            lay = form.lays.put(kind, call.look.find(Wanted(place.name, kind)))
        if lay is not None:
            return lay
        form.again = True  # it was skipped when the form was looked at, or called in another way
        lays = form.lays.all()
        lay = as_others(kind, lays)
        if lay is None:
            lay = believed(place.known, call.arguments, asked.queries, asked.keys)
            if isinstance(lay, Lay) and not is_told(lay, place.known, call.arguments):
                lay = None if is_elsewhere(lay, lays) else lay
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
        return bool(stack) and stack[-1].mode is self and not self.server.stopped
