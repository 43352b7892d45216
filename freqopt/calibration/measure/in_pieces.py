"""Recorders for a model that the compiler sees in pieces: they answer its attention in eager mode.

What the pieces do not show (grid, order, mask) is read from the whole call, written down once for
every form of input. Each call of attention is then a small graph of its own, with the recorder in
it, as without a compiler the op is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from freqopt.calibration.given import aside
from freqopt.calibration.measure.recorder import Desk, Recorder, mask_of, measured, team_of
from freqopt.capture.eager import READS_DATA, Modules, uncompiled, written
from freqopt.capture.given_ints import with_given_ints
from freqopt.capture.modules import module_of_site, names_of
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.capture.values import kept_by, kind_of, own_modules, value_of
from freqopt.eager.asked import Asked, AskedByHand, may_be_attention
from freqopt.eager.by_hand import PRODUCTS, computed, ends
from freqopt.eager.calls import placed, rewritten
from freqopt.eager.lay import Lay, lay_of
from freqopt.eager.masks import Masks
from freqopt.eager.waiting import Held, Waiting
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids, Model
from freqopt.passes.manager import rewrite
from freqopt.passes.naming import Numbered
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.rewrite import replace_site
from freqopt.passes.site import Site, Source

logger = logging.getLogger(__name__)

Sources = tuple[Source, ...]

MOST_FORMS = 1024
"""Forms of calls that are remembered."""

NOT_ANSWERED = object()

OTHER_FORM = (
    "the model's graph is in pieces, and without a compiler it is no attention over heads of the "
    "same tokens that can be measured"
)


@dataclass(frozen=True)
class _Place:
    """A site that is measured, and how its tokens lie in calls of one form."""

    recorder: Recorder
    lay: Lay


@dataclass
class _Form:
    """Calls of a model of one form.

    places: what is measured in them, by the names of sites. modules: names of those that have any
    attention. met: sites that were met in a call.
    """

    places: dict[str, _Place]
    modules: set[str]
    met: set[str] = field(default_factory=set)


class EagerRecorders:
    """Calls a model with a recorder at each attention that can be split.

    timestep: the argument that is one, by which no tokens lie otherwise.
    """

    def __init__(
        self, model: nn.Module, desk: Desk, grids: Grids, timestep: str | None = None
    ) -> None:
        self.model, self.desk, self.grids, self.timestep = model, desk, grids, timestep
        self.forms: dict[object, _Form] = {}
        self._own, self._reading = own_modules(model), set[object]()
        self.served = _Served()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, of attention as the desk's request says."""
        form = self.forms.get(self._key(args, kwargs))
        if form is None:
            form = self._look(args, kwargs)
            self.forms[self._key(args, kwargs)] = form  # whether it reads data is known only now
        modules = Modules(self.model)
        with (
            uncompiled(self.model),
            modules.watched(),
            _Answering(form, modules, self.served),
        ):
            output = computed(self.model(*args, **kwargs))
        for name in form.places:
            if name not in form.met:
                self.desk.dense_sites[name] = OTHER_FORM
            elif self.desk.dense_sites.get(name) == OTHER_FORM:  # a step cache skipped it at first
                del self.desk.dense_sites[name]
        return output

    def sources(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Sources]:
        """Where the grid of each site comes from in a call of such arguments, ints among them."""
        return {each.site.name: each.site.sources for each in self._decisions(args, kwargs)}

    def _decisions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Decision]:
        """Which sites can be measured in calls of such arguments; the model runs once."""
        model = Model(names_of(self.model))
        graph = self._written(args, kwargs)
        return rewrite(graph, measured, None, self.grids, model=model).decisions

    def _written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
        shape, _ = self._shape(args, kwargs)
        gm = None
        if with_given_ints(self.model, args, kwargs) is not None:
            try:
                with aside(args, kwargs) as copied:
                    given = with_given_ints(self.model, *copied)
                    assert given is not None
                    gm, _ = written(self.model, *given)
            except Exception as error:  # a model may ask for the very type of ints
                logger.info("which ints give the grid is not known, a call failed: %s", error)
        if gm is None:
            with aside(args, kwargs) as copied:
                gm, _ = written(self.model, *copied)
        if gm.meta[READS_DATA]:
            self._reading.add(shape)
        return gm

    def _shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, list[Any]]:
        """Shapes and types of a call's arguments but the timestep, and the arguments."""
        named = named_arguments(forward_signature(self.model), args, kwargs)
        named.pop(self.timestep or "", None)
        leaves, tree = pytree.tree_flatten(named)
        return (str(tree), tuple(map(kind_of, leaves))), leaves

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """What calls have in common that are measured alike, as where they are served."""
        shape, leaves = self._shape(args, kwargs)
        read = shape in self._reading
        return shape, tuple(value_of(leaf, read=read) for leaf in leaves), kept_by(self._own)

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Form:
        """The sites that can be measured in calls of such arguments; the others are noted."""
        decisions = self._decisions(args, kwargs)
        self.desk.team = team_of([decision.site for decision in decisions if decision.split])
        found: dict[str, _Place] = {}
        for decision in decisions:
            name, place = decision.site.name, self._place(decision)
            if place is not None:
                found[name] = place
            elif all(name not in form.places for form in self.forms.values()):
                self.desk.dense_sites[name] = OTHER_FORM if decision.split else decision.reason
        return _Form(found, {module_of_site(each.site.name)[0] for each in decisions})

    def _place(self, decision: Decision) -> _Place | None:
        site = decision.site
        mask = mask_of(site)
        if not decision.split or mask is None:
            return None
        lay = lay_of(site, content=False)
        return None if lay is None else _Place(Recorder(self.desk, site.name, mask, site), lay)


class _Slot:
    """Stands in the graph of a call for the recorder of the layer that makes it."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.__name__ = self.__qualname__ = "freqopt_calibration_recorder"

    def __call__(self, *arguments: Any) -> Tensor:
        """See `Recorder`."""
        assert self.recorder is not None
        return self.recorder(*arguments)


class _Served:
    """Calls with a recorder in their place, one graph for all that are alike."""

    def __init__(self) -> None:
        self.waiting = Waiting(MOST_FORMS)
        self.masks = Masks(MOST_FORMS)
        self._attention: dict[object, bool] = {}
        self._graphs: dict[object, tuple[fx.GraphModule, _Slot] | None] = {}

    def is_attention(self, asked: Asked) -> bool:
        """Whether a call is attention."""
        if asked.form not in self._attention:
            self._attention[asked.form] = asked.is_attention()
        return self._attention[asked.form]

    def answer(self, asked: Asked, place: _Place) -> Any:
        """What the recorder of a place makes of a call, NOT_ANSWERED if it cannot stand there."""
        lay = self.masks.checked(asked, place.lay)
        if isinstance(lay, Why):
            return NOT_ANSWERED
        key = asked.form, lay
        if key not in self._graphs:
            self._graphs[key] = _with_slot(asked, lay)
        found = self._graphs[key]
        if found is None:
            return NOT_ANSWERED
        gm, slot = found
        slot.recorder = place.recorder.masked(lay.mask)
        return gm.forward(*asked.tensors, None)


def _with_slot(asked: Asked, lay: Lay) -> tuple[fx.GraphModule, _Slot] | None:
    """The graph of a call with a slot in the place of its attention; None if there is none."""
    slot = _Slot()

    def decide(site: Site, budget: fx.Node) -> Decision:
        told = placed(site, lay)
        if isinstance(told, Why):
            return Decision(site, False, told)
        return Decision(told, True, Reason.MEASURED())

    def insert(gm: fx.GraphModule, decision: Decision) -> None:
        replace_site(gm, decision.site, slot)

    gm, decisions = rewritten(asked, 1, decide, insert)
    if [decision.split for decision in decisions] != [True]:
        return None
    gm.recompile()
    return gm, slot


class _Answering(TorchFunctionMode):
    """Has attention answered while a model runs."""

    def __init__(self, form: _Form, modules: Modules, served: _Served) -> None:
        super().__init__()
        self.form, self.modules, self.served = form, modules, served
        self.numbered = Numbered(modules.names)
        self.put_off: Held = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            found = self._meet(func, args, kwargs)
        return func(*args, **kwargs) if found is NOT_ANSWERED else found

    def _meet(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a call returns that is attention or part of it."""
        by_hand = getattr(function, "__name__", "") in PRODUCTS
        if may_be_attention(function):
            asked = Asked(function, args, kwargs)
        elif by_hand and ends(args, kwargs):
            asked = AskedByHand(function, args, kwargs)
        elif not self._may_begin(by_hand):
            return NOT_ANSWERED
        else:
            found = self.served.waiting.put_off(function, args, kwargs, self.put_off)
            return NOT_ANSWERED if found is None else found
        if not self.served.is_attention(asked):
            return NOT_ANSWERED
        name = self.numbered.of(self.modules.stack())
        place = self.form.places.get(name)
        if place is None:
            return asked.plainly()
        answer = self.served.answer(asked, place)
        if answer is NOT_ANSWERED:
            return asked.plainly()
        self.form.met.add(name)
        return answer

    def _may_begin(self, by_hand: bool) -> bool:
        """Whether a call that is made now may be a part of attention written by hand."""
        names = [self.modules.names.get(id(module), "") for module, _ in self.modules.running]
        inside = self.form.modules
        return bool(names) and (names[-1] in inside if by_hand else not inside.isdisjoint(names))
