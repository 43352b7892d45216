"""`freqopt.parallel.balance`: heads put in another order, once, so that ranks have equal work.

Heads differ in density by ten times, and ranks take equal runs of them. Attention does not depend
on the order of heads, so weights are permuted instead of what flows between ranks: rows of the
projections and norms, columns of the output projection. The model is run before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freqopt.calibration.outputs import output_tensors, relative_error
from freqopt.calibration.samples import Call, as_call
from freqopt.capture.eager import answered, written
from freqopt.capture.modules import match_names, module_of, names_of
from freqopt.errors import InputError, OptionError
from freqopt.parallel.costs import imbalance, order_of
from freqopt.parallel.head_rows import NONE, Untraceable, rows_of_site
from freqopt.parallel.permuted_plan import key_order, with_heads
from freqopt.passes.find import Grids, Model, find_on_grids
from freqopt.passes.site import Site
from freqopt.plan.plan import BALANCED, Plan

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative error that another order of summation may cause, by type; of wrong heads it is 1.4."""

Change = tuple[Tensor, int, Tensor]
"""A tensor of the model, a dimension of it, and the places that its entries come from."""


class Balanced(NamedTuple):
    """What `balance` did.

    Attributes:
        plan: the plan for the model as it is now; the one before would put budgets on wrong heads.
        before: imbalance of attention before, 1 where all ranks have equal work.
        after: the same now.
        orders: by site, numbers of the heads as they were, in the order that they have now.
        reasons: by site, why its heads were left in their places.
    """

    plan: Plan
    before: float
    after: float
    orders: dict[str, list[int]]
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"attention takes {self.before:.2f} times as long as with equal ranks before, "
            f"{self.after:.2f} times after; {len(self.orders)} sites were put in another order"
        ]
        lines += [f"{name} stays: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def balance(model: nn.Module, plan: Plan, degree: int, sample: Any) -> Balanced:
    """Put a model's heads in an order in which `degree` ranks have equal expected work.

    Call it once, on every rank alike, after weights are loaded and before they are sharded or the
    model is compiled, and go on with the plan that it returns. Which rows of which weights are
    whose head's is read off one call of the model. What ranks are expected to have is what the
    plan's own model of costs says. Heads that share a key head stay together.

    Args:
        model: the model that the plan was made for; its weights are permuted in place.
        plan: its plan.
        degree: number of ranks that share the heads: `ulysses_degree`, or that of tensor
            parallelism.
        sample: a call of the model, as keyword arguments or as (args, kwargs); a small one is
            enough. The model is run on it before and after.

    Returns:
        The plan for the model as it is now, and what was done.

    Raises:
        OptionError: fewer than two ranks.
        PlanError: a plan for another model.
        InputError: the model does something else afterwards; its weights are then as they were.
    """
    if degree < 2:
        raise OptionError(f"degree {degree} must be 2 or more: how many ranks share the heads")
    inner = module_of(model, "balance")
    plan.check_model(inner)
    args, kwargs = as_call(sample)
    with torch.no_grad():
        graph, _ = written(inner, args, kwargs)
        sites = find_on_grids(graph, Grids(), {}, Model(names_of(inner)))
        names = match_names([site.name for site in sites], plan.sites)
        orders: dict[str, list[int]] = {}
        reasons: dict[str, str] = {}
        for name in plan.sites:
            order, reason = order_of(plan, name, degree)
            if reason:
                reasons[name] = reason
            elif order != sorted(order):
                orders[name] = order
        changes, untraced = _changes(inner, plan, sites, names, orders)
        reasons.update(untraced)
        orders = {name: order for name, order in orders.items() if name not in untraced}
        _make(inner, changes, orders, (args, kwargs))
    balanced = with_heads(plan, orders)
    before = {name: plan.rows(name) for name in orders}
    if before != {name: balanced.rows(name) for name in orders}:
        inner.__dict__[BALANCED] = before
    after = imbalance(balanced, degree)
    return Balanced(balanced, imbalance(plan, degree), after, orders, reasons)


def _changes(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    names: Mapping[str, str],
    orders: Mapping[str, list[int]],
) -> tuple[list[Change], dict[str, str]]:
    """How weights are to be permuted, and of sites whose weights cannot be told, why."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    calls: dict[str, list[Site]] = {}
    for site in sites:
        if site.name in names:
            calls.setdefault(names[site.name], []).append(site)
    changes: list[Change] = []
    taken: dict[tuple[int, int], str] = {}
    reasons: dict[str, str] = {}
    for name, order in orders.items():
        try:
            if not calls.get(name):
                raise Untraceable("it was not met in this call of the model")
            found: list[Change] = []
            rows = rows_of_site(calls[name][0])
            for (tensor, dim), kinds in rows.found.items():
                if (tensor, dim) in taken:
                    raise Untraceable(f"it shares weights with {taken[tensor, dim]}")
                if tensor not in tensors:
                    raise Untraceable("a tensor that is neither parameter nor buffer has its heads")
                weight = tensors[tensor]
                if type(weight.data) is not Tensor:
                    raise Untraceable(
                        f"its weights are {type(weight.data).__name__}: balance before weights are "
                        "sharded or quantised"
                    )
                found.append((weight, dim, _places(kinds, order, plan.sites[name].heads)))
            if not any(dim == 0 for _, dim, _ in found) or not any(d == 1 for _, d, _ in found):
                raise Untraceable("no projection was found before it, or none behind it")
        except Untraceable as error:
            reasons[name] = f"which weights are whose head's cannot be told: {error}"
            continue
        changes += found
        taken.update(dict.fromkeys(rows.found, name))
    return changes, reasons


def _places(kinds: Mapping[str, Tensor], order: Sequence[int], heads: int) -> Tensor:
    """For every entry along a dimension, the place that it comes from."""
    size = len(next(iter(kinds.values())))
    source = torch.arange(size)
    for kind, numbers in kinds.items():
        count = int(numbers.max()) + 1
        of_kind = list(order) if kind == "query" else key_order(order, count)
        if len(of_kind) != count or (kind == "query" and count != heads):
            raise Untraceable(f"{count} heads where there are {heads}")
        own = [(numbers == head).nonzero().flatten() for head in range(count)]
        if len({len(each) for each in own}) > 1:
            raise Untraceable("heads have rows of different number")
        for place, head in enumerate(of_kind):
            source[own[place]] = own[head]
        assert bool((numbers[source] == NONE).eq(numbers == NONE).all())
    return source


def _make(
    model: nn.Module, changes: Sequence[Change], orders: Mapping[str, list[int]], call: Call
) -> None:
    """Permute weights; undo it where the model then does something else.

    Raises:
        InputError: it does.
    """
    before, wanted = _run(model, call)
    for weight, dim, source in changes:
        weight.data.copy_(weight.data.index_select(dim, source.to(weight.device)))
    after, found = _run(model, call)
    names = match_names(wanted, orders)
    moved = {
        name: _moved(signatures, orders[names[name]]) if name in names else signatures
        for name, signatures in wanted.items()
    }
    allowed = max((ROUNDING.get(t.dtype, 0.0) for t in before), default=0.0)
    errors = {name: relative_error([found[name]], [each]) for name, each in moved.items()}
    errors["its output"] = relative_error(after, before)
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= allowed:
        return
    for weight, dim, source in reversed(changes):
        weight.data.copy_(weight.data.index_select(dim, source.argsort().to(weight.device)))
    raise InputError(
        f"with its heads in another order {type(model).__name__} does something else: {worst} "
        f"differs by {errors[worst]:.2g} (up to {allowed:g} is rounding). Something tells heads "
        "apart that the graph of this call does not show; the weights are as they were. Please "
        "report the model"
    )


def _run(model: nn.Module, call: Call) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a model returns, and a number for each head of its attention's operands: (heads,)."""
    found: dict[str, Tensor] = {}

    def note(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = [*arguments, *(options[n] for n in ("query", "key", "value") if n in options)]
        sums = [_signature(x) for x in given[:3]]
        if len({len(x) for x in sums}) == 1:
            found[name] = torch.stack(sums)

    output = answered(model, *call, note)
    return output_tensors(output), found


def _signature(x: Tensor) -> Tensor:
    """The product of each head of (B, H, N, D) with the same random numbers, (H,)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(x.shape[-2], x.shape[-1], generator=generator, dtype=torch.float32).to(
        x.device
    )
    return (x.float() * weight).sum((0, 2, 3))


def _moved(signatures: Tensor, order: Sequence[int]) -> Tensor:
    return signatures[:, list(order)]
