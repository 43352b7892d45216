"""Recorders for a model that the compiler sees in pieces: they answer its attention in eager mode.

What the pieces do not show (grid, order, mask) is read from the whole call, written down once for
every form of input.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from freqopt.calibration.measure.recorder import Desk, Recorder, mask_of, measured, team_of
from freqopt.capture.eager import ATTENTION, answered, written
from freqopt.capture.given_ints import with_given_ints
from freqopt.capture.modules import names_of
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids, Model
from freqopt.passes.manager import rewrite
from freqopt.passes.nodes import operation
from freqopt.passes.site import Known, Site, Source

logger = logging.getLogger(__name__)

Sources = tuple[Source, ...]

OTHER_FORM = (
    "it is not one call of scaled_dot_product_attention over heads of the same tokens, with or "
    "without text in the keys, and the model's graph is in pieces, where nothing else can be "
    "measured"
)


@dataclass(frozen=True)
class _Place:
    """A site that is measured, and how its tokens lie in calls of one form."""

    recorder: Recorder
    known: Known
    dtype: torch.dtype
    scale: float


class EagerRecorders:
    """Calls a model with a recorder at each attention that can be split."""

    def __init__(self, model: nn.Module, desk: Desk, grids: Grids) -> None:
        self.model, self.desk, self.grids = model, desk, grids
        self.places: dict[object, dict[str, _Place]] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, of attention as the desk's request says."""
        form = _form_of(args, kwargs)
        if form not in self.places:
            self.places[form] = self._look(args, kwargs)
        places = self.places[form]

        def answer(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
            place = places.get(name)
            return None if place is None else _recorded(place, *arguments, **options)

        return answered(self.model, args, kwargs, answer)

    def sources(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Sources]:
        """Where the grid of each site comes from in a call of such arguments, ints among them."""
        return {each.site.name: each.site.sources for each in self._decisions(args, kwargs)}

    def _decisions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Decision]:
        """Which sites can be measured in calls of such arguments; the model runs once."""
        model = Model(names_of(self.model))
        graph = self._written(args, kwargs)
        return rewrite(graph, measured, None, self.grids, model=model).decisions

    def _written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
        given = with_given_ints(self.model, args, kwargs)
        if given is not None:
            try:
                return written(self.model, *given)[0]
            except Exception as error:  # a model may ask for the very type of ints
                logger.info("which ints give the grid is not known, a call failed: %s", error)
        return written(self.model, args, kwargs)[0]

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, _Place]:
        """The sites that can be measured in calls of such arguments; the others are noted."""
        decisions = self._decisions(args, kwargs)
        self.desk.team = team_of([decision.site for decision in decisions if decision.split])
        found: dict[str, _Place] = {}
        for decision in decisions:
            name, place = decision.site.name, self._place(decision)
            if place is not None:
                found[name] = place
            elif all(name not in places for places in self.places.values()):
                self.desk.dense_sites[name] = OTHER_FORM if decision.split else decision.reason
        return found

    def _place(self, decision: Decision) -> _Place | None:
        site = decision.site
        mask = mask_of(site)
        if not decision.split or mask is None or operation(site.node) != ATTENTION:
            return None
        if site.grid is None or not all(isinstance(e, int) for e in _extents(site)):
            return None
        t, h, w, before, after = (int(extent) for extent in _extents(site))
        known = Known((t, h, w), before, after, mask)
        recorder = Recorder(self.desk, site.name, mask, site)
        return _Place(recorder, known, site.dtype, site.scale)


def _extents(site: Site) -> tuple[Any, ...]:
    return (*(site.grid or ()), site.text_before, site.text_after)


def _form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What calls have in common that are measured alike: shapes, dtypes, and all but numbers."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    shown = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else _shown(leaf)
        for leaf in leaves
    )
    return shown, str(tree)


def _shown(leaf: object) -> str:
    return "a number" if isinstance(leaf, float) else repr(leaf)


def _recorded(
    place: _Place,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What the recorder of a site makes of a call of `scaled_dot_product_attention`."""
    known = place.known
    query, key, value = (_last_dense(each.to(place.dtype)) for each in (query, key, value))
    key_mask = None
    if known.mask and attn_mask is not None:
        row = known.before if attn_mask.shape[-2] > 1 else 0
        key_mask = attn_mask[:, 0, row].expand(query.shape[0], -1)
    length = query.shape[2]
    if length < key.shape[2]:  # text is in the keys only
        query = F.pad(query, (0, 0, known.before, known.after))
    out = place.recorder(
        query, key, value, key_mask, known.grid, known.before, known.after, place.scale
    )
    if length < key.shape[2]:
        out = out.narrow(2, known.before, length)
    if known.mask == 2 and key_mask is not None:
        out = out.masked_fill(~key_mask[:, None, :, None], 0.0)
    return out


def _last_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
