"""Asks masks at every call whether they are as calibration saw them; attention is dense if not.

A graph that does not show what its mask is of says nothing about the calls to come. The values of
a mask are read once for each tensor that they come from, which waits for the device: once in a
call of a model whose blocks are all given one mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from freqopt.capture.call_grids import MOST_KNOWN, Seen, int_inputs
from freqopt.capture.values import is_unreadable
from freqopt.errors import SiteError
from freqopt.passes.masks.calibrated import KEYS, NOTHING, PAIRS
from freqopt.passes.masks.ready_made import Program, program_of
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Argument, Believed, Rest, Site, Value
from freqopt.telling.said import warn

ROWS = 1024
"""Rows of a mask over pairs that are compared at a time."""

Feed = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def is_as_believed(mask: Tensor, kind: int, before: int, video: int) -> bool:
    """Whether a mask (B or 1, H or 1, Q or 1, K) hides no video token; waits for the device.

    kind: it shows all pairs (or adds zeros), is one row of keys for all queries, or an outer
    product of keys and queries. before, video: where the keys lie that have to be seen.
    """
    if kind == NOTHING or mask.dtype != torch.bool:
        plain = kind == NOTHING and not mask.dtype.is_complex
        return plain and bool(_once(mask).all() if mask.dtype == torch.bool else (mask == 0).all())
    whole = mask if kind == PAIRS else _once(mask)
    at = before if kind == PAIRS and whole.shape[2] > 1 else 0
    row = whole[:, :1, at : at + 1]
    fits = row[..., before : before + video].all()
    if kind == KEYS and whole.shape[1:3] == (1, 1):
        return bool(fits)
    column = row.transpose(-2, -1)
    for start in range(0, whole.shape[2], ROWS):
        rows = whole[:, :, start : start + ROWS]
        meant = row if kind == KEYS else row & column[:, :, start : start + ROWS]
        fits = fits & (rows == meant).all()
    return bool(fits)


def _once(mask: Tensor) -> Tensor:
    """A mask without what is read from the same memory again, but for its keys."""
    for dim in range(mask.dim() - 1):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


class Around(NamedTuple):
    """Tokens of a call: video, and before and after it; None for all that are left."""

    before: int | None
    video: int
    after: int | None


class AskedMask:
    """A mask that is asked at calls. places: of the program's inputs among a call's arguments.

    While a CUDA graph is captured nothing can be read, and what the latest call found counts.
    """

    def __init__(self, program: Program, places: Sequence[int], kind: int) -> None:
        self.module, self.places, self.kind = program.module, tuple(places), kind
        self._known: dict[object, Seen[bool]] = {}
        self._latest = True

    def __call__(self, arguments: Sequence[Any], around: Around) -> bool:
        """Whether it is as believed in a call."""
        given = [arguments[place] for place in self.places]
        tensors = [item for item in given if isinstance(item, Tensor)]
        numbers = tuple(item for item in given if not isinstance(item, Tensor))
        if any(map(is_unreadable, tensors)):
            return self._latest
        key = (*map(id, tensors), numbers, around)
        known = self._known.get(key)
        if known is not None and known.is_of(tensors):
            return known.value
        with torch.no_grad():
            mask = self.module(*given)
            before = around.before
            if before is None:
                before = mask.shape[-1] - around.video - (around.after or 0)
            found = self._latest = is_as_believed(mask, self.kind, before, around.video)
        if not any(tensor.is_inference() for tensor in tensors):  # nobody counts writes into these
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = Seen(tensors, found)
        return found


class Unlike:
    """Says once of each site that its mask keeps it dense; an error under `strict`."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._said: set[str] = set()

    def tell(self, sites: Iterable[str], why: Why) -> None:
        """Tell of sites, and why they are dense in this call.

        Raises:
            SiteError: under `strict`.
        """
        names = list(sites)
        if self.strict:
            raise SiteError(f"attention at {', '.join(names)} stays dense: {why}")
        if new := [name for name in names if name not in self._said]:
            self._said.update(new)
            warn(f"attention at {', '.join(new)} stays dense: {why}")


@dataclass
class _Kept:
    """A number that a graph takes: 1 at calls whose mask is as believed, else 0.

    layout: before, t, h, w and after. node: the number. sites: their names.
    """

    believed: Believed
    program: Program
    layout: tuple[Argument, ...]
    node: fx.Node
    sites: list[str] = field(default_factory=list)


Read = Callable[[Sequence[Any]], int | None]


class AskedMasks:
    """The masks of a graph that are believed: the graph gets an int input for each."""

    def __init__(self, *, strict: bool) -> None:
        self._kept: list[_Kept] = []
        self._unlike = Unlike(strict=strict)

    @property
    def nodes(self) -> list[fx.Node]:
        """The inputs."""
        return [kept.node for kept in self._kept]

    @property
    def examples(self) -> list[Any]:
        """What the inputs are in the call that the graph is compiled for."""
        return [node.meta["example_value"] for node in self.nodes]

    def watch(self, gm: fx.GraphModule, sites: Sequence[Site]) -> None:
        """Have the masks of sites asked; a mask that cannot be is not believed."""
        for site in sites:
            if not site.eligible or site.believed is None:
                continue
            kept = self._of(gm, site, site.believed)
            if kept is None:
                site.why = Reason.MASK_UNPROVEN()
            else:
                site.kept = Value(kept.node)
                kept.sites.append(site.name)

    def _of(self, gm: fx.GraphModule, site: Site, believed: Believed) -> _Kept | None:
        layout = (
            *site.text_before_arguments[:1], *site.grid_arguments, *site.text_after_arguments[:1]
        )  # fmt: skip
        for kept in self._kept:
            if (kept.believed, kept.layout) == (believed, layout):
                return kept
        rests = [place for place, each in enumerate(layout) if isinstance(each, Rest)]
        read = all(isinstance(each, (int, Value, Rest)) for each in layout)
        if not read or rests not in ([], [0], [4]):
            return None
        program, places = program_of(believed.mask, gm.graph), gm.graph.find_nodes(op="placeholder")
        made = program and int_inputs(gm, places, f"mask_{len(self._kept)}", {"kept": 1})
        if not program or not made:
            return None
        self._kept.append(_Kept(believed, program, layout, made[0]))
        return self._kept[-1]

    def settle(self, gm: fx.GraphModule) -> None:
        """Take inputs that nothing uses out of the graph, and put the others behind all others."""
        if not self._kept:
            return
        for kept in self._kept[:]:
            if kept.node.users:
                gm.graph.find_nodes(op="placeholder")[-1].append(kept.node)
            else:
                gm.graph.erase_node(kept.node)
                self._kept.remove(kept)
        gm.recompile()

    def feed(self, gm: fx.GraphModule, feed: Feed | None) -> Feed | None:
        """Adds the numbers to the arguments of a call, behind what another feed adds.

        Raises (when called):
            SiteError: under `strict`, where a mask is not as believed.
        """
        if not self._kept:
            return feed
        order = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        asked = []
        for kept in self._kept:
            places = [order[node] for node in kept.program.inputs]
            mask = AskedMask(kept.program, places, kept.believed.kind)
            asked.append((mask, [_reader(each, order) for each in kept.layout], kept.sites))
        own, ask = feed or tuple, self._ask

        def add(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            arguments = own(arguments)
            return (*arguments, *[ask(arguments, *each) for each in asked])

        return add

    def _ask(
        self, arguments: Sequence[Any], mask: AskedMask, layout: list[Read], sites: list[str]
    ) -> int:
        """1 where a mask is as believed; 0 where it is not, or the call tells no grid."""
        before, t, h, w, after = (read(arguments) for read in layout)
        video = (t or 0) * (h or 0) * (w or 0)
        if not video:  # which is told elsewhere
            return 0
        if mask(arguments, Around(before, video, after)):
            return 1
        self._unlike.tell(sites, Reason.MASK_UNLIKE())
        return 0


def _reader(argument: Argument, order: Mapping[fx.Node, int]) -> Read:
    """Reads an extent from the arguments of a call; None for what is left."""
    if isinstance(argument, Rest):
        return lambda arguments: None
    if isinstance(argument, int):
        return lambda arguments: argument
    assert isinstance(argument, Value)
    place = order[argument.node]
    return lambda arguments: int(arguments[place])
