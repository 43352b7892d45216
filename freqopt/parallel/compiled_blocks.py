"""Blocks that are compiled, and whose self-attention is answered by Python, as in eager mode.

One graph serves all blocks. In the place of each attention stands an op that asks whoever serves
the model; which attention it is comes as data: a number that the attention's module brings along.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from freqopt.backend import inner_backend
from freqopt.capture.eager import ATTENTION
from freqopt.capture.modules import blocks_around, module_of_site, modules_of
from freqopt.errors import SiteError, through_compiler
from freqopt.kernels.mark import first_tensor, mark, with_item
from freqopt.options import Compiled
from freqopt.parallel.refusals import (
    computed_otherwise,
    of_another_form,
    reaches_all_keys,
    untold,
)
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids
from freqopt.passes.manager import rewrite
from freqopt.passes.nodes import operation
from freqopt.passes.reasons import Reason
from freqopt.passes.site import Site

NUMBERS = "freqopt_site_numbers"
"""Attribute of a module for the numbers of its attentions, () int64 on the CPU each."""

ASKS = -20_260_030
"""Key of our hook, the same in all modules: the compiler guards on the keys of hooks."""

OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

Ask = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
"""Attention of a site by name, of query, key, value, mask and scale as the model gave them."""

_owners: WeakValueDictionary[int, Blocks] = WeakValueDictionary()
_numbers = itertools.count()


class Blocks:
    """The blocks of a model, compiled from `start` to `stop`.

    Args:
        sites: names of the attentions to ask about, in the model.
        ask: answers for one. It is called while the model runs, in the order of the graph.
        inner: the backend that compiles the blocks.

    Raises:
        SiteError: from `start`, attention that is in no block; while compiling, one that cannot be
            told, or that something else than PyTorch computes.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[str], ask: Ask, inner: str | Callable[..., Compiled]
    ) -> None:
        self.sites, self.ask, self.inner = list(sites), ask, inner
        self.number = next(_numbers)
        modules = modules_of(model)
        self.places: dict[nn.Module, dict[int, Tensor]] = {}
        for at, site in enumerate(self.sites):
            path, nth = module_of_site(site)
            own = self.places.setdefault(modules[path], {})
            own.setdefault(nth, torch.tensor(at, device="cpu", dtype=torch.int64))
        names = [module_of_site(site)[0] for site in self.sites]
        self.blocks = {name: modules[name] for name in blocks_around(model, names)}
        self.kept: dict[nn.Module, Any] = {}
        for name in names:
            if not any(name == block or name.startswith(f"{block}.") for block in self.blocks):
                raise SiteError(
                    f"attention at {name or 'the model itself'} is in no block of a list of "
                    "blocks, so it cannot be compiled so; leave out inner="
                )

    def start(self) -> None:
        """Compile the blocks, at their next call."""
        _owners[self.number] = self
        for module, numbers in self.places.items():
            module.__dict__[NUMBERS] = tuple(numbers.items())
            module._forward_pre_hooks[ASKS] = bring_numbers
            module._forward_pre_hooks_with_kwargs[ASKS] = True
        for block in self.blocks.values():
            self.kept[block] = block._compiled_call_impl
            block.compile(backend=self._backend)

    def stop(self) -> None:
        """Leave the blocks as they were."""
        for module in self.places:
            module.__dict__.pop(NUMBERS, None)
            module._forward_pre_hooks.pop(ASKS, None)
            module._forward_pre_hooks_with_kwargs.pop(ASKS, None)
        for block, compiled in self.kept.items():
            block._compiled_call_impl = compiled
        self.kept.clear()
        _owners.pop(self.number, None)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        with through_compiler():
            rewrite(gm, _decided, self._put, Grids(), strict=True)
        compiled: Compiled = inner_backend(self.inner, None)(gm, example_inputs)
        return compiled

    def _put(self, gm: fx.GraphModule, decision: Decision) -> None:
        """Let the op ask in the place of a site."""
        old, given = decision.site.node, _operands(decision.site)
        with old.graph.inserting_before(old):
            arguments = (*(given[n] for n in OPERANDS[:4]), decision.budget, given["scale"])
            target = torch.ops.freqopt.ask_owner.default
            new = old.graph.call_function(target, (*arguments, self.number))
            new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)


def bring_numbers(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a module with attention: marks a tensor by the numbers of its sites."""
    if not torch.compiler.is_compiling():
        return None
    at = first_tensor(args, kwargs)
    if at is None:
        return None
    for nth, number in module.__dict__[NUMBERS]:
        item = args[at] if isinstance(at, int) else kwargs[at]
        args, kwargs = with_item(args, kwargs, at, mark(item, number, [], nth, 0))
    return args, kwargs


def _decided(sites: Sequence[Site]) -> list[Decision]:
    """All self-attention is asked about.

    Raises:
        SiteError: attention that may be one, or may not, that another function computes, or
            whose number is not known.
    """
    found = []
    for site in sites:
        if site.kind == "cross":
            found.append(Decision(site, False, site.why))
            continue
        if operation(site.node) != ATTENTION:
            raise computed_otherwise(site.name)
        if not reaches_all_keys(site) or site.mark is None:
            raise untold(site)
        found.append(Decision(site, True, Reason.BY_MODULE(), site.mark.budget))
    return found


def _operands(site: Site) -> Mapping[str, Any]:
    """What the attention of a site is called with.

    Raises:
        SiteError: it is causal, or has dropout.
    """
    node = site.node
    given = dict.fromkeys(OPERANDS) | dict(zip(OPERANDS, node.args, strict=False)) | node.kwargs
    if given["is_causal"] or given["dropout_p"]:
        raise of_another_form(site.name)
    return given


@torch.library.custom_op("freqopt::ask_owner", mutates_args=())
def ask_owner(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    which: Tensor,
    scale: float | None,
    owner: int,
) -> Tensor:
    """Attention of the site of this number, by whoever has compiled the blocks.

    query: (B, H, N, D); key, value: (B, Hkv, N, D); mask: as the model gave it. which: () int64 on
    the CPU. Returns (B, H, N, D), laid out as (B, N, H, D).

    Raises:
        SiteError: nobody serves it any more.
    """
    blocks = _owners.get(owner)
    if blocks is None:
        raise SiteError("a block was compiled to reach the keys of all ranks, and that is over")
    found = blocks.ask(blocks.sites[int(which)], query, key, value, mask, scale)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


@ask_owner.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    which: Tensor,
    scale: float | None,
    owner: int,
) -> Tensor:
    batch, heads, length, dim = query.shape
    return query.new_empty((batch, length, heads, dim)).transpose(1, 2)
