"""Puts off the calls that attention by hand is made of, and those that read their results.

What a call will return is asked once for each form of its arguments, of tensors without values.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from freqopt.eager.asked import example_of, form_of_call
from freqopt.eager.by_hand import (
    BETWEEN,
    PRODUCTS,
    WEIGHING,
    Like,
    PutOff,
    Step,
    can_begin,
    can_go_on,
    is_put_off,
    reads,
    tensors_in,
    writes,
)
from freqopt.eager.latest import Latest

Held = list[weakref.ref[PutOff]]
"""What stands for calls in one module, as long as something holds it."""


class Waiting:
    """What is known of calls that are put off. most: forms that are kept."""

    def __init__(self, most: int) -> None:
        self._likes: Latest[tuple[Like | int | None]] = Latest(most, "forms of calls put off")

    def put_off(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], held: Held
    ) -> Tensor | None:
        """What stands for the result of a call; None: it is to be made now.

        held: of the module that is running. What in it reads a tensor that the call writes into is
        computed before.
        """
        name = getattr(function, "__name__", "")
        if name not in PRODUCTS and name not in BETWEEN:
            if held and writes(name, kwargs):
                _compute_before_writing(held, tensors_in(args, kwargs))
            return None
        tensors = tensors_in(args, kwargs)
        waiting = [t for t in tensors if isinstance(t, PutOff) and is_put_off(t)]
        if name in PRODUCTS:
            if waiting or not can_begin(args, kwargs):
                return None
        elif not waiting or not can_go_on(args, kwargs):
            return None
        like = self._like(function, args, kwargs, tensors)
        if isinstance(like, int):
            return tensors[like]
        if like is None:
            return None
        weighs = name in WEIGHING or any(t.weighs for t in waiting)
        made = PutOff(Step(function, args, kwargs), like, weighs)
        held.append(weakref.ref(made))
        return made

    def _like(
        self, function: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]
    ) -> Like | int | None:
        """What a call returns: a new tensor like this, the tensor it is given with this number.

        None: something else, such as several tensors.
        """
        form = form_of_call(function, args, kwargs)
        known = self._likes.get(form)
        if known is None:
            known = self._likes.put(form, (_like(example_of(function, args, kwargs), tensors),))
        return known[0]


def _like(example: Any, tensors: Sequence[Tensor]) -> Like | int | None:
    """See `Waiting._like`. example: what a call returns of tensors."""
    for number, tensor in enumerate(tensors):
        if example is tensor:
            return number
    if not isinstance(example, FakeTensor):
        return None
    return Like(example.shape, example.stride(), example.dtype, example.device)


def _compute_before_writing(held: Held, tensors: Sequence[Tensor]) -> None:
    items = [item for ref in held if (item := ref()) is not None and is_put_off(item)]
    held[:] = map(weakref.ref, items)
    for item in items:
        if reads(item, tensors):
            item.compute()
