"""A model whose ranks have parts of the sequence attends over all keys, split by its plan.

What diffusers' `ring_degree` does for dense attention: inputs are shared out and outputs brought
together by the model's own hooks, and here each self-attention reaches the keys of all ranks. A
site that cannot is an error; none attends over the keys of one rank.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freqopt.capture.budgets import budget_at
from freqopt.capture.call_layouts import in_call
from freqopt.capture.eager import answered, written
from freqopt.capture.modules import match_names, module_of, names_of
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.capture.under_way import Arguments, arguments_by_name
from freqopt.errors import InputError, PlanError, SiteError, unwrapped
from freqopt.grid import Grid
from freqopt.options import Compiled, load_plan
from freqopt.parallel.compiled_blocks import Blocks
from freqopt.parallel.refusals import (
    computed_otherwise,
    of_another_form,
    reaches_all_keys,
    untold,
)
from freqopt.parallel.sequence import Method, attention_over_ranks
from freqopt.passes.find import Grids, Model, find_on_grids
from freqopt.passes.nodes import is_distributed
from freqopt.passes.reasons import Reason
from freqopt.plan.plan import Plan
from freqopt.telling.outside import tell_outside


class _Place(NamedTuple):
    """A self-attention of the model: its name in the plan, and what its mask may be."""

    planned: str | None
    masked: bool


@contextmanager
def over_all_keys(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    method: Method = "gather",
    grid: Grid | None = None,
    threshold: float | None = None,
    density: float | None = None,
    inner: str | Callable[..., Compiled] | None = None,
) -> Iterator[None]:
    """Let calls of a model on parts of its sequence attend over the keys of all ranks.

    The model must share out its tokens evenly among the ranks and bring its output together, as
    diffusers' do after ``enable_parallelism(config=ContextParallelConfig(ring_degree=P))``; what
    that sets up for attention is put aside meanwhile. All ranks have all heads, so heads that do
    not divide work. The model runs without gradients, in eager mode unless `inner` is given; every
    `scaled_dot_product_attention` over its own tokens is taken over, cross-attention stays.

    Args:
        model: the model.
        plan: its plan, or the path of one; a plan does not know how many ranks there are. Sites
            that it leaves dense, or does not know, attend over all keys exactly.
        group: the ranks; by default those of diffusers' ring, else all.
        method: "gather" or "ring", see `attention_over_ranks`.
        grid: extents of the video tokens of all ranks together, where there is no plan.
        threshold, density: instead of a plan, as `freqopt.split_attention` has them.
        inner: the backend that compiles the model's blocks, such as "inductor": all of them share
            one graph, in which an op of ours stands for each attention.

    Raises:
        InputError: both a plan and budgets, or a model that shares out its heads.
        PlanError: a plan for another model, or one that was calibrated at other lengths.
        SiteError: when the model is called: attention whose keys cannot be told to be all here, or
            one that something else than PyTorch computes, or, with `inner`, one in no block.
    """
    module = module_of(model, "over_all_keys")
    budgets = None if plan is None else load_plan(plan)
    if budgets is not None and (threshold is not None or density is not None or grid is not None):
        raise InputError("a plan was given, and grid, threshold or density too; it has its own")
    if budgets is not None:
        budgets.check_model(module)
        tell_outside(module, budgets, ())
    budget = {"threshold": threshold, "density": density}
    served = _Served(module, budgets, method, grid, budget, inner)
    with ExitStack() as stack:
        ring = stack.enter_context(_own_attention_aside(module))
        served.group = group if group is not None else ring
        stack.enter_context(served.serving())
        yield


class _Now(NamedTuple):
    """A call under way: its attentions, those that were met, and what selects grid and budget."""

    places: dict[str, _Place]
    met: set[str]
    told: Arguments
    bucket: Tensor | None


class _Served:
    """Calls the model, its self-attention reaching all keys."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None,
        method: Method,
        grid: Grid | None,
        budget: dict[str, Any],
        inner: str | Callable[..., Compiled] | None,
    ) -> None:
        self.model, self.plan, self.method, self.grid = model, plan, method, grid
        self.budget, self.inner, self.group = budget, inner, None
        self.places: dict[object, dict[str, _Place]] = {}
        self.blocks: Blocks | None = None
        self.before: Any = None
        self.now: _Now | None = None

    group: dist.ProcessGroup | None

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The model's calls come here."""
        self.before = self.model._compiled_call_impl
        self.model._compiled_call_impl = self
        try:
            yield
        finally:
            self.model._compiled_call_impl = self.before
            if self.blocks is not None:
                self.blocks.stop()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own call."""
        with torch.no_grad():
            form = _form_of(args, kwargs)
            if form not in self.places:
                self.places[form] = self._look(args, kwargs)
            told = arguments_by_name(self.model, args, kwargs)
            now = _Now(self.places[form], set(), told, self._bucket(args, kwargs))
            if self.inner is None:
                output = answered(self.model, args, kwargs, functools.partial(self._answer, now))
            else:
                output = self._in_blocks(now, self.inner, args, kwargs)
        if missing := sorted(set(now.places) - now.met):
            raise computed_otherwise(missing[0])
        return output

    def _in_blocks(
        self, now: _Now, inner: str | Callable[..., Compiled], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What the model returns, its blocks compiled."""
        if self.blocks is None or not now.places.keys() <= set(self.blocks.sites):
            names = [*now.places] if self.blocks is None else [*self.blocks.sites, *now.places]
            if self.blocks is not None:
                self.blocks.stop()
            self.blocks = Blocks(self.model, list(dict.fromkeys(names)), self._asked, inner)
            self.blocks.start()
        self.now, self.model._compiled_call_impl = now, self.before
        try:
            with unwrapped():
                return self.model(*args, **kwargs)
        finally:
            self.now, self.model._compiled_call_impl = None, self

    def _asked(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """The answer to a compiled block."""
        found = None
        if self.now is not None:
            options = {"attn_mask": mask, "scale": scale}
            found = self._answer(self.now, name, (query, key, value), options)
        if found is None:
            raise SiteError(
                f"attention at {name} was met outside a call of the model; call the model itself"
            )
        return found

    def _answer(
        self, now: _Now, name: str, given: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor | None:
        """Attention of a site, None where it needs no other rank's keys."""
        now.met.add(name)
        place = now.places.get(name)
        if place is None:
            return None
        return self._attend(name, place, now.told, now.bucket, given, options)

    def _look(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, _Place]:
        """The self-attention of the model; what is none is left alone.

        Raises:
            SiteError: one that may be, or may not.
        """
        graph, _ = written(self.model, args, kwargs)
        model = Model(names_of(self.model))
        sites = find_on_grids(graph, Grids(), {}, model)
        names = {} if self.plan is None else match_names([s.name for s in sites], self.plan.sites)
        found = {}
        for site in sites:
            if site.kind == "cross":
                continue
            if not reaches_all_keys(site):
                raise untold(site)
            found[site.name] = _Place(names.get(site.name), site.attention.mask is not None)
        return found

    def _attend(
        self,
        name: str,
        place: _Place,
        told: Arguments,
        bucket: Tensor | None,
        given: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Tensor:
        query, key, value, mask, scale = _arguments(name, *given, **options)
        common: dict[str, Any] = {
            "group": self.group,
            "method": self.method,
            "key_mask": mask,
            "scale": scale,
        }
        if self.plan is None:
            return attention_over_ranks(query, key, value, grid=self.grid, **self.budget, **common)
        planned = None if place.planned is None else self.plan.sites[place.planned]
        if planned is None or place.planned is None or planned.decision == "dense":
            return attention_over_ranks(query, key, value, exact=True, **common)
        budgets = self.plan.module_budgets(place.planned)
        row = budgets.amin(0) if bucket is None else _at(budgets, self.plan.timestep_edges, bucket)
        grid, before, after = self._layout(place.planned, told, query.shape[2])
        listed = planned.chunks or [0] * key.shape[1]
        chunks = torch.tensor(listed, dtype=torch.int64, device="cpu")
        return attention_over_ranks(
            query,
            key,
            value,
            grid=grid,
            text_before=before,
            text_after=after,
            threshold=row[0].to(query.device),
            order=chunks if bool(chunks.any()) else "grid",
            **common,
        )

    def _layout(self, planned: str, told: Arguments, tokens: int) -> tuple[Grid, int, int]:
        """Grid of all ranks together, and text tokens at either end of each rank's part.

        told: arguments of the call, which the plan may know to tell the grid.
        """
        assert self.plan is not None
        ranks = dist.get_world_size(self.group)
        fitting = {}
        for each in self.plan.known(planned):
            known = in_call(each, told, ranks * tokens)
            around = None if known is None else known.around(ranks * tokens)
            if known is not None and around is not None and not any(n % ranks for n in around):
                fitting[known.grid] = (around[0] // ranks, around[1] // ranks)
        if len(fitting) != 1:
            raise PlanError(
                f"site {planned!r} has {tokens} tokens on each of {ranks} ranks here and was "
                f"calibrated on {[known.grid for known in self.plan.known(planned)]}: not one of "
                "these fits alone; calibrate with samples of this size"
            )
        (grid, (before, after)), *_ = fitting.items()
        return grid, before, after

    def _bucket(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The timestep of a call, where the plan selects by it."""
        if self.plan is None or self.plan.timestep_name is None or not self.plan.timestep_edges:
            return None
        named = named_arguments(forward_signature(self.model), args, kwargs)
        found = named.get(self.plan.timestep_name)
        if not isinstance(found, (Tensor, int, float)):
            raise PlanError(
                f"the plan selects budgets by the argument {self.plan.timestep_name!r} of the "
                f"model, and this call has none with a value (it has {', '.join(named)})"
            )
        return torch.as_tensor(found)


def _at(budgets: Tensor, edges: Sequence[float], timestep: Tensor) -> Tensor:
    """The budget (2, H) of (buckets, 2, H) at a timestep."""
    bounds = torch.tensor(list(edges), dtype=torch.float32, device=timestep.device)
    return budget_at(budgets.flatten(1).to(timestep.device), bounds, timestep).view_as(budgets[0])


def _arguments(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """Of a call of `scaled_dot_product_attention` what can be served.

    Raises:
        SiteError: what cannot.
    """
    if any(is_distributed(tensor) for tensor in (query, key, value)):
        raise SiteError(f"attention at {name} stays as it is: {Reason.DISTRIBUTED().seen}")
    if is_causal or dropout_p:
        raise of_another_form(name)
    mask = None
    if attn_mask is not None:
        wide = (query.shape[0], key.shape[2])
        over_keys = attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1)
        if attn_mask.dtype != torch.bool or not over_keys or attn_mask.shape[-1] != wide[1]:
            raise SiteError(
                f"the mask of attention at {name} is {attn_mask.dtype} of shape "
                f"{tuple(attn_mask.shape)}; bool over this rank's keys, (batch, 1, 1, keys), is "
                "supported"
            )
        mask = attn_mask[:, 0, 0].expand(wide)
    return query, key, value, mask, scale


def _form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What calls have in common whose attention is alike: the form and sizes of what is given."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    shapes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)
    return shapes, str(tree)


@contextmanager
def _own_attention_aside(model: nn.Module) -> Iterator[dist.ProcessGroup | None]:
    """Put aside what processors would do about keys of other ranks; the group that they would ask.

    Raises:
        InputError: they share out heads.
    """
    found = [
        (processor, config)
        for module in model.modules()
        if (processor := getattr(module, "processor", None)) is not None
        and (config := getattr(processor, "_parallel_config", None)) is not None
    ]
    group: dist.ProcessGroup | None = None
    for _, config in found:
        context = getattr(config, "context_parallel_config", None)
        if getattr(context, "ulysses_degree", 1) > 1 or getattr(context, "ring_anything", False):
            raise InputError(
                "the model shares out its heads (ulysses_degree), or parts of unequal length "
                "(ring_anything); over_all_keys is for ring_degree alone"
            )
        mesh = getattr(context, "_ring_mesh", None)
        group = None if mesh is None else mesh.get_group()
    for processor, _ in found:
        processor._parallel_config = None
    try:
        yield group
    finally:
        for processor, config in found:
            processor._parallel_config = config
