"""Whether a call of one of torch's functions tells Python, or itself, what is in a tensor.

What is made of it then follows data, and another call of the same shapes may make something else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from freqopt.capture.values import is_unreadable

READS = frozenset(
    {
        "item",
        "tolist",
        "numpy",
        "equal",
        "allclose",
        "is_nonzero",
        "__array__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__index__",
        "__int__",
    }
)
"""Functions that tell Python what is in a tensor."""

SIZED = frozenset({"repeat_interleave", "tensor_split"})
"""Functions that take tensors behind the first, and read them for the sizes of what they make."""

INDEXED = frozenset({"__getitem__", "__setitem__"})


class _Takes(NamedTuple):
    """Which arguments of an operator may be tensors, in any of its forms.

    by_place: for each positional one; the last goes for all behind it. by_name: names of such.
    """

    by_place: tuple[bool, ...]
    by_name: frozenset[str]

    def tensor(self, place: int | str) -> bool:
        """Whether an argument may be one."""
        if isinstance(place, str):
            return place in self.by_name
        return not self.by_place or self.by_place[min(place, len(self.by_place) - 1)]


UNKNOWN = _Takes((True, False), frozenset({"input"}))
"""Of what is no operator, such as F.interpolate: a tensor that is no number comes first."""


class AsRead(NamedTuple):
    """A call's arguments, with ints in the place of tensors that the function takes for numbers.

    reads: whether it reads what is in a tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: bool


def as_read(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AsRead:
    """What a call of a function reads.

    Sizes, steps and bounds of slices may be tensors of one int, which C++ reads by itself.
    """
    name = str(getattr(function, "__name__", ""))
    everything: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    given = {place for place, item in everything.items() if any(map(_is_one, _flat(item)))}
    if name in READS or not given:
        return AsRead(tuple(args), dict(kwargs), name in READS)
    if name in INDEXED:
        everything[1] = _bounds(args[1])
        reads = any(map(_is_bound, _parts(args[1])))
    elif name.startswith("__"):
        reads = False  # arithmetic takes tensors
    else:
        takes = _takes_of(function, name)
        read = {place for place in given if not takes.tensor(place)}
        reads = bool(read)
        if takes is not UNKNOWN:
            everything |= {place: _numbers(everything[place]) for place in read}
    return AsRead(
        tuple(everything[place] for place in range(len(args))),
        {key: everything[key] for key in kwargs},
        reads,
    )


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_bound(part: Any) -> bool:
    """Whether a part of an index is a number that is read from a tensor.

    Tensors of more dimensions say which entries are meant, and are looked up where they are.
    """
    return any(map(_is_one, _flat(part))) if isinstance(part, slice) else _is_number(part)


def _bounds(index: Any) -> Any:
    """An index with numbers in the place of tensors that it takes for such."""
    parts = tuple(_numbers(part) if _is_bound(part) else part for part in _parts(index))
    return parts if isinstance(index, tuple) else parts[0]


def _numbers(item: Any) -> Any:
    """An argument with ints in the place of tensors of one, where these can be read."""
    return fx.node.map_aggregate(item, _number)


def _number(item: Any) -> Any:
    return int(item) if _is_one(item) and not is_unreadable(item) else item


def _is_number(item: Any) -> bool:
    return _is_one(item) and not item.dim()


def _is_one(item: Any) -> bool:
    """Whether something is a plain tensor of one int."""
    if type(item) is not Tensor or item.numel() != 1:
        return False
    return not (item.is_floating_point() or item.is_complex() or item.dtype == torch.bool)


def _flat(item: Any) -> Iterator[Any]:
    """What is in lists and slices."""
    if isinstance(item, slice):
        item = (item.start, item.stop, item.step)
    if isinstance(item, (tuple, list)):
        for each in item:
            yield from _flat(each)
    else:
        yield item


def _takes_of(function: Any, name: str) -> _Takes:
    """What a function takes, which is one of PyTorch's, or an operator of another library."""
    packet = getattr(function, "overloadpacket", function)
    return _takes(packet) if hasattr(packet, "overloads") else _takes_of_name(name)


@functools.cache
def _takes_of_name(name: str) -> _Takes:
    packet = getattr(torch.ops.aten, name, None)
    return UNKNOWN if packet is None or name in SIZED else _takes(packet)


def _takes(packet: Any) -> _Takes:
    """What an operator takes in all its forms together."""
    names = {"input"}  # as Python calls what schemas call self
    forms: list[list[bool]] = []
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        names.update(each.name for each in arguments if _is_of_tensors(each))
        forms.append([_is_of_tensors(each) for each in arguments if not each.kwarg_only])
    longest = max(map(len, forms), default=0)
    filled = [form + form[-1:] * (longest - len(form)) for form in forms if form]
    return _Takes(tuple(any(place) for place in zip(*filled, strict=True)), frozenset(names))


def _is_of_tensors(argument: Any) -> bool:
    return "Tensor" in str(argument.type)
