"""What is known of the calls of a model by their form: how the tokens of its attentions lie.

The first call of a form is written down while it runs. At each attention the graph so far tells
where its tokens come from, so that this very call is served, and no call is made twice: step caches
and other hooks would notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from freqopt.capture.call_grids import Reader
from freqopt.capture.conditions import dtype_of
from freqopt.capture.eager import Writer, writing
from freqopt.capture.one_call import GivenCall
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.capture.values import kept_by, kind_of, own_modules, value_of
from freqopt.decisions import grids_of
from freqopt.eager.asked import apart
from freqopt.eager.latest import Latest
from freqopt.eager.lay import Kind, Lay, lay_of
from freqopt.options import Options
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids, Model
from freqopt.passes.known import UNSHOWN
from freqopt.passes.manager import rewrite
from freqopt.passes.naming import Names
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Known, Site
from freqopt.positions import layout_of_positions

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

MOST_LOOKS = 4
"""Calls of one form that are written down before what is not known by then stays dense."""

MOST_FORMS = 256
"""Forms that are remembered; more are those of a model with an argument that is never the same."""

MOST_COMPARED = 8
"""Forms of one shape that a new one is compared with, to see what makes no difference."""

FLEETING = 2
"""Calls of one value of an argument, at most, where it is a step's, with text and without."""

MOST_LAYS = 64
"""Kinds of sites that are remembered in each; more are those of lengths that depend on data."""


DEVICES = ("cpu", "cuda")
"""Kinds of devices that the op has kernels for, each of which has an autocast of its own."""

Lays = Latest[Lay | Why]
"""By kind of site."""


@dataclass
class Form:
    """What calls of one form have in common.

    lays: by kind of site, see `Look.find`. again: whether the next call is to be written down.
    looks: how many were. calls: how many there were. values: what they were given, by argument.
    around: see `_around`. decided: what was done in activation checkpoints that a backward pass may
    run again, which has to do the same whatever is known by then.
    """

    lays: Lays = field(default_factory=lambda: Latest(MOST_LAYS, "kinds of sites"))
    again: bool = True
    looks: int = 0
    calls: int = 0
    values: tuple[object, ...] = ()
    around: object = None
    decided: Lays = field(default_factory=lambda: Latest(MOST_LAYS, "kinds of sites"))

    def is_like(self, others: Sequence[Form]) -> bool:
        """Whether tokens of these calls lie alike, of which none come again and again."""
        lays = self.lays.all()
        fleeting = all(form.calls <= FLEETING for form in (self, *others))
        return bool(lays) and fleeting and all(form.lays.all() == lays for form in others)

    def tells_other(self, form: Form) -> bool:
        """Whether the same attention lies otherwise in calls of another form."""
        lays, others = self.lays.all(), form.lays.all()
        return any(lays[kind] != others[kind] for kind in lays.keys() & others.keys())


@dataclass(frozen=True)
class Wanted:
    """A site in the call that is under way.

    kind: what its calls have in common with those of other layers.
    """

    name: str
    kind: Kind


@dataclass
class Family:
    """Forms of calls of the same shapes.

    readers: of positions, with the places of what they read among the arguments. reads: whether
    the model read data in such a call. telling, idle: places of arguments that made a difference,
    and of those that never are the same and made none. looked: the forms that were looked at last.
    """

    readers: list[tuple[int, Reader]]
    reads: bool = False
    telling: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    looked: list[Form] = field(default_factory=list)

    def learn(self, form: Form) -> bool:
        """Compare a form that was looked at with others; whether more arguments are idle.

        An argument is where three values of it, of a call or two each, went with the same lay of
        all tokens while others stayed what they are, or changed as often: the number of a step.
        """
        self.looked = [other for other in self.looked if other is not form][-MOST_COMPARED:]
        for other in self.looked:
            places = self._apart(form, other)
            if len(places) == 1 and form.tells_other(other):
                self.telling |= places
        found: set[int] = set()
        for others in combinations(self.looked, 2):
            if form.is_like(others):
                found |= self._apart(form, *others)
        self.looked.append(form)
        found -= self.telling
        self.idle |= found
        return bool(found)

    def _apart(self, *forms: Form) -> set[int]:
        """Places in which all forms differ; none where some are alike in one, and some not."""
        values = zip(*(form.values for form in forms), strict=True)
        counts = {i: len(set(each)) for i, each in enumerate(values) if i not in self.idle}
        if any(1 < count < len(forms) for count in counts.values()):
            return set()
        return {place for place, count in counts.items() if count > 1}


class Forms:
    """All forms of the calls of a model. known: layouts that a plan has, by the name of a site."""

    def __init__(
        self, model: nn.Module, plan: Plan, known: Mapping[str, tuple[Known, ...]]
    ) -> None:
        self.model, self.plan = model, plan
        self.known = dict(known)
        self._own = own_modules(model)
        self._forms: Latest[Form] = Latest(MOST_FORMS, "forms of calls of a model")
        self._families: Latest[Family] = Latest(MOST_FORMS, "shapes of calls of a model")

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Form:
        """The form of a call: shapes, values other than the timestep, grids of its positions.

        And what its attention may be called in another way by, see `_around`.
        Of tensors' values those of small ones of ints, where the model is known to read data.
        """
        key, _, values = self._key(args, kwargs)
        form = self._forms.get(key) or self._forms.put(key, Form(values=values, around=key[-1]))
        form.calls += 1
        return form

    def looked_at(
        self, form: Form, args: Sequence[Any], kwargs: Mapping[str, Any], *, reads: bool
    ) -> None:
        """A call of a form was written down. reads: whether the model read data in it."""
        _, family, _ = self._key(args, kwargs, form)
        if reads and not family.reads:
            family.reads, family.looked = True, []
            key, _, form.values = self._key(args, kwargs, form)
            self._forms.put(key, form)
        if family.learn(form):
            key, _, form.values = self._key(args, kwargs, form)
            self._forms.put(key, form)

    def _key(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], form: Form | None = None
    ) -> tuple[tuple[object, ...], Family, tuple[object, ...]]:
        """What a form is kept under, the forms of its shapes, and what its arguments tell.

        form: of a call that is over, in which modules may have begun to keep something else.
        """
        named = named_arguments(forward_signature(self.model), tuple(args), dict(kwargs))
        named.pop(self.plan.timestep_name or "", None)
        leaves, tree = pytree.tree_flatten(named)
        shape = (str(tree), tuple(kind_of(leaf) for leaf in leaves))
        family = self._families.get(shape)
        if family is None:
            found = [(i, Reader("positions", 4)) for i, leaf in enumerate(leaves) if _tells(leaf)]
            family = self._families.put(shape, Family(found))
        told = tuple(reader.read([leaves[i]]) for i, reader in family.readers)
        kept = kept_by(self._own) if form is None else form.values[-1]
        values = (
            *(
                None if i in family.idle else value_of(leaf, read=family.reads)
                for i, leaf in enumerate(leaves)
            ),
            None if len(leaves) in family.idle else kept,
        )
        around = _around(self.model, leaves) if form is None else form.around
        return (shape, told, values, around), family, values


class Look:
    """One call that is written down while it runs."""

    def __init__(
        self, forms: Forms, form: Form, names: Names, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self.forms, self.form, self.names = forms, form, names
        self.args, self.kwargs = args, kwargs
        self.given = GivenCall(forms.model, args, kwargs)
        self.missing: list[Wanted] = []
        self._open = ExitStack()
        self.writer: Writer = self._open.enter_context(writing(forms.model, args, kwargs))
        form.looks += 1
        form.again = False

    def begin(self, function: Any, args: Any, kwargs: Any, example: Any) -> fx.Node:
        """Write an attention that is about to be served."""
        return self.writer.begin(function, args, kwargs, example)

    def find(self, wanted: Wanted) -> Lay | Why:
        """How the tokens of a site lie, which is at the last node written."""
        site = next((s for s in reversed(self._sites()) if _base(s.name) == wanted.name), None)
        lay = Reason.NO_AXES() if site is None else self._lay(site, wanted)
        if isinstance(lay, Why) and lay.reason in UNSHOWN:
            self.missing.append(wanted)
        return lay

    def close(self) -> None:
        """The call is over: what nothing before an attention told may be told behind it."""
        self._open.close()
        if self.missing and self.writer.graph.nodes:
            sites = {_base(site.name): site for site in self._sites()}
            for wanted in self.missing:
                if wanted.name in sites:
                    self.form.lays.put(wanted.kind, self._lay(sites[wanted.name], wanted))
        self.forms.looked_at(self.form, self.args, self.kwargs, reads=self.writer.reads)

    def abandon(self) -> None:
        """The call has failed."""
        self._open.close()

    def _lay(self, site: Site, wanted: Wanted) -> Lay | Why:
        return lay_of(site, content=wanted.kind.content) or site.why

    def _sites(self) -> list[Site]:
        """The sites of the graph so far."""
        found: list[Site] = []

        def look(sites: Sequence[Site]) -> list[Decision]:
            found.extend(sites)
            return [Decision(site, False, site.why) for site in sites]

        with torch._C.DisableTorchFunction(), apart(), self.writer.closed() as gm:
            known = self.forms.known
            layouts = lambda name: known.get(_base(name), ())  # noqa: E731
            model = Model(self.names, layouts, called=True, asked=True)
            rewrite(gm, look, None, self._grids(gm), model=model)
        return found

    def _grids(self, gm: fx.GraphModule) -> Grids:
        known = (k for layouts in self.forms.known.values() for k in layouts)
        return grids_of(Options(plan=self.forms.plan), self.given.tells(gm, known))


def _base(name: str) -> str:
    return name.partition("@")[0]


def _around(model: nn.Module, leaves: Sequence[object]) -> object:
    """What attention in a call follows beside shapes and values, as far as the call shows it.

    Whether gradients may be asked for, types that autocast or weights bring, strides and devices:
    attention is called in another way with each, of which no call with others tells.
    """
    kept = tuple((_strides(leaf), leaf.device) for leaf in leaves if isinstance(leaf, Tensor))
    autocast = [torch.get_autocast_dtype(d) for d in DEVICES if torch.is_autocast_enabled(d)]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return kept, tuple(autocast), modes, dtype_of(model)


def _strides(tensor: Tensor) -> object:
    return tensor.stride() if tensor.layout is torch.strided else tensor.layout


def _tells(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and layout_of_positions(leaf) is not None
