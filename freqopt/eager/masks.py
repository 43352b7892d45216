"""The mask of the very call: whether it is what the first call of its form showed of it.

A graph of one call proves things of a mask by that call's numbers. Where these were read from
tensors, or kept by a module, the next call of the same shapes may have others, and no form tells.
So the mask itself is looked at, once for as long as nobody writes into what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from freqopt.capture.asked_masks import is_as_believed
from freqopt.capture.call_grids import MOST_KNOWN, Seen, place_of
from freqopt.capture.values import is_unreadable
from freqopt.eager.asked import QUERY_KEY_VALUE, Asked
from freqopt.eager.calls import rewritten
from freqopt.eager.latest import Latest
from freqopt.eager.lay import UNSEEN, Lay
from freqopt.passes.decision import Decision
from freqopt.passes.masks.added import LOW, shown_by
from freqopt.passes.masks.calibrated import KEYS, NOTHING, PAIRS
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Site

Key = tuple[object, ...]


@dataclass
class _Mask:
    """How the mask of calls of one form is made. reads: of which of the call's tensors.

    latest: what the calls with a lay had last.
    """

    gm: fx.GraphModule
    reads: tuple[int, ...]
    known: dict[Key, Seen[Lay | Why]] = field(default_factory=dict)
    latest: dict[Lay, Lay | Why] = field(default_factory=dict)

    def of(self, tensors: Sequence[Tensor], lay: Lay) -> Lay | Why:
        read = [tensors[i] for i in self.reads]
        if any(is_unreadable(tensor) for tensor in read):
            unshown = lay if lay.mask or lay.proven else Reason.MASK_UNPROVEN()
            return self.latest.get(lay, unshown)
        whole = [tensor if tensor._base is None else tensor._base for tensor in read]
        shapes = tuple(
            (place_of(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in read
        )
        key = (lay, shapes, *map(id, whole))
        known = self.known.get(key)
        if known is None or not known.is_of(whole):
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            with torch.no_grad():
                known = self.known[key] = Seen(whole, _checked(self.gm(*tensors), lay))
            self.latest[lay] = known.value
        return known.value


class Masks:
    """Of the calls of a model. most: forms that are remembered."""

    def __init__(self, most: int) -> None:
        self._made: Latest[tuple[_Mask | None]] = Latest(most, "forms of attention with masks")

    def checked(self, asked: Asked, lay: Lay) -> Lay | Why:
        """How the tokens of a call lie, with the mask that it has; why it has to stay dense.

        Waits for the device where the mask is another than before.
        """
        if lay.mask == UNSEEN or len(asked.tensors) <= QUERY_KEY_VALUE:
            return lay
        found = self._made.get(asked.form)
        if found is None:
            found = self._made.put(asked.form, (_mask_in(asked),))
        return lay if found[0] is None else found[0].of(asked.tensors, lay)


def _mask_in(asked: Asked) -> _Mask | None:
    """What makes the mask of a call from its tensors; None if it has none."""
    made: list[_Mask] = []

    def decide(site: Site, budget: fx.Node) -> Decision:
        mask = site.attention.mask
        if mask is not None:
            made.append(_making(shown_by(site.attention) or mask, budget))
        return Decision(site, False, site.why)

    rewritten(asked, 1, decide, lambda gm, decision: None)
    return made[0] if made else None


def _making(mask: fx.Node, budget: fx.Node) -> _Mask:
    """The part of a call's graph that makes its mask; it takes the call's tensors."""
    wanted, pending = {mask}, [mask]
    while pending:
        new = [node for node in pending.pop().all_input_nodes if node not in wanted]
        wanted.update(new)
        pending += new
    graph, copies, reads = fx.Graph(), dict[fx.Node, fx.Node](), []
    inputs = [node for node in mask.graph.find_nodes(op="placeholder") if node is not budget]
    for node in mask.graph.nodes:
        if node in inputs or node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    reads = [index for index, node in enumerate(inputs) if node in wanted]
    graph.output(copies[mask])
    return _Mask(fx.GraphModule(nn.Module(), graph), tuple(reads))


def _checked(mask: Tensor, lay: Lay) -> Lay | Why:
    """What a mask is in a call: what it was shown to be if that holds, or what else is served."""
    if mask.dtype != torch.bool:
        if is_as_believed(mask, NOTHING, 0, 0):
            return lay._replace(mask=0, proven=True)
        if not mask.is_floating_point() or not ((mask == 0) | (mask <= LOW)).all():
            return Reason.MASK_ADDED(dtype=mask.dtype)
        mask = mask > LOW
    for kind in sorted((NOTHING, KEYS, PAIRS), key=lambda kind: kind != lay.mask):
        if _has_form(mask, kind) and is_as_believed(mask, kind, lay.before, math.prod(lay.grid)):
            return lay._replace(mask=kind, proven=True)
    return Reason.MASK_UNLIKE()


def _has_form(mask: Tensor, kind: int) -> bool:
    """Whether a mask has the dimensions of one of its kind, (B, H, Q, K)."""
    if kind == NOTHING:
        return True
    if mask.dim() != 4 or mask.shape[-1] == 1:
        return False
    return kind == KEYS or (mask.shape[1] == 1 and mask.shape[2] == mask.shape[3])
