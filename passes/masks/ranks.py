"""Masks that were shared out among ranks and gathered again: what they were before that."""

from __future__ import annotations

from torch import fx

from freqopt.passes.axes.heads import GATHERS, rank_of
from freqopt.passes.nodes import argument, known_int, operation, shape

KEEPS = {"wait_tensor", "_wrap_tensor_autograd", "contiguous", "clone", "to", "bool", "detach"}
CUTS = {"chunk", "split", "tensor_split"}


def whole_of(node: fx.Node) -> fx.Node | None:
    """Of equal parts that all ranks had of one tensor, joined in their order, that tensor.

    As `all_gather_tensor(x.chunk(P, dim)[rank], dim)` is written: gathered along the first
    dimension, taken apart, and joined along the one that was cut.
    """
    if operation(node) != "cat":
        return None
    pieces = [_piece(each) for each in argument(node, 0, "tensors")]
    dim = _dim(node, argument(node, 1, "dim", "axis", default=0))
    first = pieces[0] if pieces else None
    if first is None or [p and p[:2] for p in pieces] != [
        (first[0], i) for i in range(len(pieces))
    ]:
        return None
    gather = _kept(first[0].args[0])
    if gather is None or operation(gather) not in GATHERS or first[2] != 0:
        return None
    mine = _piece(_kept(gather.args[0]))
    if mine is None or mine[2] != dim:
        return None
    ranks, rank = rank_of(gather)
    source = mine[0].args[0]
    if not isinstance(source, fx.Node) or mine[1] != rank or ranks != len(pieces):
        return None
    return source if shape(source) == shape(node) else None


def _piece(node: object) -> tuple[fx.Node, int, int] | None:
    """The node that cut a tensor, which of its parts this is, and along which dimension."""
    if not isinstance(node, fx.Node) or operation(node) != "getitem":
        return None
    cut, index = node.args[0], known_int(node.args[1])
    if not isinstance(cut, fx.Node) or operation(cut) not in CUTS or index is None:
        return None
    whole = cut.args[0]
    dim = known_int(argument(cut, 2, "dim", "axis", default=0))
    if not isinstance(whole, fx.Node) or dim is None:
        return None
    return cut, index, dim % max(len(shape(whole)), 1)


def _kept(node: object) -> fx.Node | None:
    """What a tensor was before operations that keep its entries as they are."""
    while isinstance(node, fx.Node) and operation(node) in KEEPS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _dim(node: fx.Node, dim: object) -> int | None:
    found = known_int(dim)
    return None if found is None else found % max(len(shape(node)), 1)
