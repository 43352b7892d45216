"""Masks that are made empty and then written True into: which entries of which rows.

As models spell it, `mask[i, :length] = True`, and as torch.export does, in views that are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from freqopt.passes.axes.dimensions import at_most
from freqopt.passes.masks.memory import is_written, may_share
from freqopt.passes.masks.writes import written_by
from freqopt.passes.nodes import argument, known_int, operation, shape, value
from freqopt.passes.site import Extent

EVERY = -1
"""In the place of a row: all of them."""

VIEWS = frozenset(["select", "slice", "getitem"])
"""Operations that leave a row of (rows, entries), or some entries that lie together."""

CONSTANTS = frozenset(["lift_fresh_copy", "lift_fresh", "lift", "detach", "clone", "to"])
"""Operations between a constant of an exported program and what uses it."""


class Entries(NamedTuple):
    """Some entries of (rows, entries); stop None: to the end. whole: both axes are still there."""

    row: int = EVERY
    start: Extent = 0
    stop: Extent | None = None
    whole: bool = True

    def cover(self, start: Extent, stop: Extent) -> bool:
        """Whether all entries of a range are among them."""
        inside = at_most(0, self.start) and at_most(self.start, start)
        return inside and (self.stop is None or at_most(stop, self.stop))


class _Write(NamedTuple):
    """entries: None where they are not known. item: what is written."""

    node: fx.Node
    entries: Entries | None
    item: Any


def rows_covered(item: fx.Node, start: Extent, stop: Extent) -> bool:
    """Whether writes of True into (rows, entries) cover a range of entries in every row.

    The tensor has to be no view, and all writes to come before it is read for anything else.
    """
    sizes = shape(item)
    if len(sizes) != 2 or not is_made_here(item):
        return False
    writes = list(_writes_into(item))
    readers = [user for user in item.users if not _only_leads_to(user, item, writes)]
    if not writes or not readers or any(may_share(r, item) and is_written(r) for r in readers):
        return False
    position = {node: i for i, node in enumerate(item.graph.nodes)}
    if max(position[write.node] for write in writes) > min(position[user] for user in readers):
        return False
    known = [write.entries for write in writes if write.entries and is_one(write.item)]
    if len(known) < len(writes):
        return False
    rows = {entries.row for entries in known if entries.cover(start, stop)}
    return EVERY in rows or (isinstance(sizes[0], int) and set(range(sizes[0])) <= rows)


def is_made_here(node: fx.Node) -> bool:
    """Whether a tensor has memory of its own: it is no input, and no view of another tensor."""
    sources = node.all_input_nodes
    return node.op.startswith("call") and not any(may_share(node, source) for source in sources)


def is_one(item: Any) -> bool:
    """Whether a constant is True, in a mask of bools or of numbers that become bools."""
    if isinstance(item, fx.Node):
        while operation(item) in CONSTANTS and item.args and isinstance(item.args[0], fx.Node):
            item = item.args[0]
        held = _attribute(item)
        return held is not None and held.numel() == 1 and bool(held == 1)
    return isinstance(item, (bool, int, float)) and item == 1


def _attribute(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a graph's module keeps under a name, if it has values."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None or is_written(node):
        return None
    held: Any = owner
    for name in str(node.target).split("."):
        held = getattr(held, name, None)
    return held if type(held) in (torch.Tensor, torch.nn.Buffer) and not held.is_meta else None


def _writes_into(view: fx.Node, entries: Entries | None = Entries()) -> Iterator[_Write]:  # noqa: B008
    """All writes into a tensor, and into views of it of these kinds."""
    for user in view.users:
        if view in written_by(user):
            name = operation(user)
            if name == "setitem" and view is user.args[0]:
                yield _Write(user, entries and _indexed(entries, user.args[1]), user.args[2])
            else:
                plain = name in ("fill_", "copy_") and not user.users
                yield _Write(user, entries if plain else None, argument(user, 1, "value", "src"))
        elif operation(user) in VIEWS and user.args[0] is view:
            yield from _writes_into(user, entries and _viewed(entries, user))


def _only_leads_to(user: fx.Node, item: fx.Node, writes: list[_Write]) -> bool:
    """Whether a node writes into a tensor, or is a view of it that only serves writes."""
    if any(user is write.node for write in writes):
        return True
    is_view = operation(user) in VIEWS and user.args[0] is item and len(user.users) > 0
    return is_view and all(_only_leads_to(each, user, writes) for each in user.users)


def _viewed(entries: Entries, view: fx.Node) -> Entries | None:
    """What a view leaves of some entries; None where that is not known."""
    name = operation(view)
    if name == "getitem":
        return _indexed(entries, view.args[1])
    dim = known_int(argument(view, 1, "dim", default=0))
    if name == "select":
        row = known_int(argument(view, 2, "index"))
        if row is None or row < 0 or not (entries.whole and dim in (0, -2)):
            return None
        return entries._replace(row=row, whole=False)
    step = argument(view, 4, "step", default=1)
    along = (1, -1) if entries.whole else (0, -1)
    if dim not in along or value(step) != 1:
        return None
    return _cut(entries, argument(view, 2, "start"), argument(view, 3, "end"))


def _indexed(entries: Entries, index: Any) -> Entries | None:
    """What `[row]`, `[row, start:stop]` or `[:, start:stop]` leaves, or `[start:stop]` of a row."""
    parts = index if isinstance(index, tuple) else (index,)
    axes = 2 if entries.whole else 1
    if len(parts) > axes:
        return None
    row, part = (None, *parts, *[slice(None)] * (axes - len(parts)))[-2:]
    if not isinstance(part, slice) or value(part.step) not in (None, 1):
        return None
    cut = _cut(entries, part.start, part.stop)
    if cut is None or not entries.whole or row == slice(None):
        return cut
    place = known_int(row)
    return cut._replace(row=place, whole=False) if place is not None and place >= 0 else None


def _cut(entries: Entries, start: Any, stop: Any) -> Entries | None:
    """Entries from one place to another, where none were left out before."""
    start, stop = value(start), value(stop)
    if (start, stop) == (None, None):
        return entries
    if (entries.start, entries.stop) != (0, None):
        return None
    return entries._replace(start=0 if start is None else start, stop=stop)
