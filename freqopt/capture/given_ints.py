"""Which ints among a model's arguments the sizes of tensors are that it makes of them.

Tokens that come packed may have their grid told beside them, as plain numbers. Those that a call is
written down with know where they are from, and each operation that is given one is asked which of
its result's sizes follow it: equal numbers that have nothing to do with the grid do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from freqopt.capture.under_way import default_ints
from freqopt.passes.site import ITSELF, Source


class GivenInt(int):
    """An int that was an argument of the model, or has been divided since without a remainder.

    name: of the argument, as in `Source`. step: what it was divided by. Other arithmetic gives
    plain ints.
    """

    name: str
    step: int

    def __new__(cls, value: int, name: str = "", step: int = 1) -> GivenInt:
        """`value` is that of the argument over `step`."""
        made = super().__new__(cls, value)
        made.name, made.step = name, step
        return made

    def __floordiv__(self, other: int) -> int:
        """Known still, where nothing is left over."""
        quotient = super().__floordiv__(other)
        if type(other) is int and other > 0 and quotient is not NotImplemented:
            if quotient * other == self:
                return GivenInt(quotient, self.name, self.step * other)
        return quotient

    @property
    def given(self) -> int:
        """The argument."""
        return int(self) * self.step


def with_given_ints(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call's arguments with all positive ints in them as `GivenInt`; None where there are none.

    Defaults of the model's `forward` are arguments too.
    """
    found = False

    def known(path: Sequence[Any], leaf: Any) -> Any:
        nonlocal found
        if type(leaf) is not int or leaf < 1:
            return leaf
        found = True
        keys = (getattr(key, "key", getattr(key, "idx", "")) for key in path[1:])
        return GivenInt(leaf, "_".join(map(str, keys)))

    everything = {**default_ints(model, args, kwargs), **kwargs}
    given = pytree.tree_map_with_path(known, (tuple(args), everything))
    return given if found else None


def plain(item: Any) -> Any:
    """What an operation was given, as it would be without this."""
    return int(item) if isinstance(item, GivenInt) else item


def ints_in(arguments: Any) -> dict[str, list[GivenInt]]:
    """What an operation was given of the model's ints, by their names."""
    found: dict[str, list[GivenInt]] = {}

    def note(item: Any) -> Any:
        if isinstance(item, GivenInt):
            found.setdefault(item.name, []).append(item)
        return item

    fx.node.map_aggregate(arguments, note)
    return found


def sizes_given(
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    sizes: Sequence[int],
    ints: Mapping[str, list[GivenInt]],
) -> dict[int, Source]:
    """Which sizes of an operation's result are ints that it was given, by dimension.

    The operation is asked for one less of each, on the meta device. args, kwargs: its own, with
    nodes for tensors. sizes: of its result. ints: as `ints_in` has them.
    """
    found: dict[int, Source] = {}
    for name, items in ints.items():
        whole = items[0].given
        for dim, size in enumerate(sizes):
            if size < 1 or whole % size or any((whole // size) % each.step for each in items):
                continue
            less = _sizes(func, args, kwargs, name, whole // size)
            if less == (*sizes[:dim], size - 1, *sizes[dim + 1 :]):
                found[dim] = Source(name, ITSELF, whole // size)
    return found


def _sizes(
    func: Callable[..., Any], args: Any, kwargs: Any, name: str, less: int
) -> tuple[int, ...] | None:
    """The sizes of an operation's result where one argument of the model is less by a number."""
    makes = True

    def changed(item: Any) -> Any:
        nonlocal makes
        if isinstance(item, fx.Node):
            makes = False
            like = item.meta["example_value"]
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        if isinstance(item, GivenInt) and item.name == name:
            return int(item) - less // item.step
        return plain(item)

    try:
        given, options = fx.node.map_aggregate((args, kwargs), changed)
        made = func(*given, **(dict(options, device="meta") if makes else options))
    except Exception:  # which other sizes an operation takes is its own affair
        return None
    return tuple(made.shape) if isinstance(made, Tensor) else None
