"""One rewritten `torch.export` program for every exporter: sites found, plan baked in.

torch.compile backends take no part in torch.export, so the passes run here once more, on the
exported graph before its decompositions. Budgets become buffers called freqopt.budget.<site>, the
chunks of orders by content freqopt.chunks.<site>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

import freqopt.kernels.op  # noqa: F401  registers the operator
from freqopt.capture.looking import looking
from freqopt.capture.one_call import GivenCall
from freqopt.config import DEFAULT_CHUNK, DEFAULT_PROBES
from freqopt.decisions import decide, grids_of
from freqopt.errors import OptionError, PlanError
from freqopt.exporters.complex_numbers import make_real
from freqopt.exporters.free_extents import asked_free, fixed_notes
from freqopt.exporters.lengths import Length, check_example, length_of
from freqopt.exporters.problems import ExportError
from freqopt.exporters.squeezes import drop_idle_squeezes
from freqopt.given_grid import contradiction
from freqopt.grid import Grid
from freqopt.options import Options, parse_options
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids, Model
from freqopt.passes.manager import rewrite
from freqopt.passes.reasons import Reason
from freqopt.passes.rewrite.rewrite import split_as_decided
from freqopt.passes.site import Known, Site
from freqopt.telling.outside import tell_outside

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

BUDGET_PREFIX = "freqopt.budget."
CHUNKS_PREFIX = "freqopt.chunks."
THRESHOLD, CHUNKS = 3, 11
"""Arguments of the op that are constants of a site."""


@dataclass(frozen=True)
class SplitSite:
    """One rewritten attention.

    budget: name of its initialiser. masked: has a key mask. chunks: name of the initialiser with
    the key heads' chunks, None where all are in the grid's order; largest_chunk: the largest of
    them. other_queries: the queries are other tokens than the keys. length: its number of keys.
    """

    budget: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    masked: bool
    density: float
    probes: int
    chunks: str | None = None
    largest_chunk: int = 0
    other_queries: bool = False
    length: Length = None


@dataclass
class Program:
    """A rewritten program, the sites that were split, and why the others were not."""

    exported: torch.export.ExportedProgram
    split: dict[str, SplitSite] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_program(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan | None = None,
    dynamic_shapes: Any = None,
    grid: Grid | None = None,
    order: str | None = None,
    chunk: int | str = DEFAULT_CHUNK,
    probes: int = DEFAULT_PROBES,
) -> Program:
    """Export a model and replace every attention that the plan splits.

    Args:
        model: any module that torch.export can trace with these arguments.
        args, kwargs: an example call.
        plan: which sites to split and their budgets; without one every eligible site is split at a
            density of 0.25.
        dynamic_shapes: as in torch.export.export.
        grid: extents (t, h, w) where neither the graph nor the plan tells them.
        order, chunk: how tokens are ordered without a plan, as the backend's options of that name.

    Raises:
        OptionError: an order that is unknown, or was given with a plan, or dimensions to be free
            that an input does not have.
        ExportError: torch.export cannot trace the model, or complex numbers have no real form.
        PlanError: the plan was made for another model, or splits nothing of this one.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {type(model).__name__}; a torch.nn.Module is supported")
    given = {"plan": plan, "grid": grid, "min_tokens": 0, "order": order}
    settings = parse_options({**given, "chunk": chunk} if order == "content" else given)
    if plan is not None:
        plan.check_model(model)
        tell_outside(model, plan, ())
    asked = asked_free(model, args, kwargs or {}, dynamic_shapes)
    was_training = model.training
    model.eval()
    try:
        exported = _export(model, model, args, kwargs, dynamic_shapes)
    finally:
        model.train(was_training)
    program = Program(exported)
    graph = exported.module()
    contradicted = contradiction(graph, settings.grid)
    program.notes += [contradicted] if contradicted else []

    names: dict[str, str] = {}  # a wrapper's sites have the plan's names, by which budgets change

    def decide_here(sites: Sequence[Site]) -> list[Decision]:
        if plan is not None:
            names.update(plan.names_of([site.name for site in sites]))
        # An exported file runs anywhere, its function bodies for any head_dim.
        found = decide(settings, sites, device=torch.device("cpu"))
        found = [_for_export(decision, graph, probes) for decision in found]
        if plan is not None:
            split = [decision.site for decision in found if decision.split]
            check_example(plan, {names[site.name]: site.key_length for site in split})
        return found

    def put(gm: fx.GraphModule, decision: Decision) -> None:
        name, length = names.get(decision.site.name, decision.site.name), decision.site.key_length
        length_here = length_of(gm, length)
        program.split[name] = replace(_split(gm, decision, name), length=length_here)

    grids, known = grids_of(settings), Model()
    if plan is not None and dynamic_shapes is None:
        grids, known = _fixed(settings, plan, graph, GivenCall(model, args, kwargs or {}))
    for decision in rewrite(graph, decide_here, put, grids, model=known).decisions:
        if not decision.split:
            name = names.get(decision.site.name, decision.site.name)
            program.dense[name] = decision.reason
    if plan is not None:
        _check_plan_used(plan, program)
    is_changed = drop_idle_squeezes(graph)
    if make_real(graph) or is_changed or program.split:
        # Exported once more: the passes write for Dynamo's graphs too, export makes it all aten.
        program.exported = _export(graph, model, args, kwargs, dynamic_shapes)
    program.notes += fixed_notes(program.exported, asked, args, kwargs or {})
    if not program.split:
        program.notes.append("no site was split: this is the model as it was, with dense attention")
    return program


def _fixed(
    settings: Options, plan: Plan, graph: fx.GraphModule, call: GivenCall
) -> tuple[Grids, Model]:
    """Grids and layouts where all extents are those of a call: it tells them, and the plan does."""

    def known(name: str) -> Sequence[Known]:
        planned = plan.names_of([name]).get(name)
        return () if planned is None else plan.known(planned)

    layouts = (layout for name in plan.sites for layout in plan.known(name))
    grids = grids_of(settings, call.tells(graph, layouts))
    return grids, Model(known=known, called=True)


def _export(
    module: nn.Module,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), looking():  # what serves the model has no part in it
            return torch.export.export(
                module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # torch.export raises a family of types that varies by version
        raise ExportError(_explain(model, error)) from error


def _explain(model: nn.Module, error: Exception) -> str:
    name = type(model).__name__
    text = f"{type(error).__name__}: {error}".strip()
    first = "\n".join(text.splitlines()[:6])
    data = ("data-dependent", "DataDependent", "GuardOnDataDependent", "unbacked")
    if any(word in text for word in data):
        return (
            f"{name} cannot be exported: its control flow depends on the data of a tensor, and an "
            "exported graph has one path. Make the choice from shapes or Python values, or use "
            f"torch.cond; torch.export said: {first}"
        )
    return (
        f"{name} cannot be exported with these arguments; torch.export said: {first}. Check that "
        "args and kwargs are an example call of the model, and that dynamic_shapes names extents "
        "that the model leaves free"
    )


def _for_export(decision: Decision, graph: fx.GraphModule, probes: int) -> Decision:
    """A decision as an exported file can have it: in the graph itself, at one budget for good.

    Of timestep buckets the most exact.
    """
    if not decision.split:
        return decision
    if decision.site.node.graph is not graph.graph:
        return Decision(decision.site, False, Reason.IN_A_BODY())
    budget = decision.budget
    if isinstance(budget, Tensor):
        budget = budget if budget.dim() == 2 else budget.amin(0)
    return replace(decision, budget=budget, timestep=None, probes=probes)


def _split(graph: fx.GraphModule, decision: Decision, name: str) -> SplitSite:
    call, site = split_as_decided(graph, decision).call, decision.site
    budget = BUDGET_PREFIX + name
    _name_buffer(graph, call, THRESHOLD, budget)
    chunks = None
    if decision.largest_chunk:
        chunks = CHUNKS_PREFIX + name
        _name_buffer(graph, call, CHUNKS, chunks)
    return SplitSite(
        budget=budget,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        dtype=str(site.dtype).removeprefix("torch."),
        masked=call.args[4] is not None,
        density=decision.density,
        probes=decision.probes,
        chunks=chunks,
        largest_chunk=decision.largest_chunk,
        other_queries=bool(site.query_arguments),
    )


def _check_plan_used(plan: Plan, program: Program) -> None:
    planned = [name for name, site in plan.sites.items() if site.decision == "split"]
    missing = [name for name in planned if name not in program.split]
    if planned and len(missing) == len(planned):
        whys = dict.fromkeys(program.dense[name] for name in missing if name in program.dense)
        found = ", ".join([*program.split, *program.dense][:4]) or "no attention"
        raise PlanError(
            f"none of the {len(planned)} sites that this plan splits can be split in the exported "
            f"program (found: {found})" + "".join(f"; {why}" for why in list(whys)[:2])
        )
    for name in missing:
        why = program.dense.get(name, "it was not found")
        program.notes.append(f"the plan splits {name}, which is not split here: {why}")
    if plan.timestep_edges:
        program.notes.append(
            "the plan has timestep buckets; an exported file holds one budget per site, the most "
            "exact of them"
        )


def _name_buffer(graph: fx.GraphModule, call: fx.Node, argument: int, name: str) -> None:
    """Move a constant that `insert_split` made to a buffer of the given dotted name."""
    constant = call.args[argument]
    assert isinstance(constant, fx.Node) and constant.op == "get_attr"
    made = str(constant.target)
    value = getattr(graph, made)
    delattr(graph, made)
    path, _, leaf = name.rpartition(".")
    owner: nn.Module = graph
    for part in path.split("."):
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    owner.register_buffer(leaf, value)
    constant.target = name
