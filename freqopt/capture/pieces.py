"""Which part of which model a graph is, and budgets for graphs that serve several layers.

After a graph break, or in a block compiled by itself, one graph runs for many modules. Which of
them is running is on Python's stack, at compile time as at every call: its budget becomes one more
input of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from freqopt.capture.asked_masks import AskedMasks
from freqopt.capture.budgets import attribute_of
from freqopt.capture.call_lengths import CallLengths
from freqopt.capture.feeding import Budget, Callers, Feeding, NamedParts
from freqopt.capture.model_tells import Number, model_before, told_by_model
from freqopt.capture.modules import (
    PlannedCallers,
    forwards_under_way,
    module_of_site,
    modules_of,
    names_of,
    running,
)
from freqopt.capture.repeated import in_backward
from freqopt.capture.under_way import arguments_of
from freqopt.errors import InputError
from freqopt.options import Options, load_plan
from freqopt.passes.axes.told import Told
from freqopt.passes.bodies import bring
from freqopt.passes.decision import Decision
from freqopt.passes.find import Model
from freqopt.passes.naming import module_path, passes_through, plain_path, site_name
from freqopt.passes.rewrite.adding import fake_mode
from freqopt.passes.rewrite.reuse import copied
from freqopt.passes.site import Known, Site
from freqopt.regional import ATTACHED, SELECTS, Facts
from freqopt.telling.attached import attached_to
from freqopt.telling.verdict import alike

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan
    from freqopt.telling.running import Graph

OTHER_LAYER = "*"
"""Stands for the number of the layer in the names of sites whose graph serves several layers."""

REENTRANT = (
    "activation checkpointing with use_reentrant=True has {part} compiled in the backward pass, "
    "outside of any call of its model: call checkpoint with use_reentrant=False, or "
    "freqopt.attach(model, plan) before the blocks are compiled"
)


class Part:
    """The part of a model that a graph is.

    root: the model, or the module in it that has all sites of the plan; None where no module is
    running. runner: the innermost module that is running, which runs the graph. caller: the
    model that the plan is for, whose call tells of the grid. inputs: budgets that the graph takes
    at every call, by the module that is running then, and numbers, by the call of the model. masks:
    those that it asks at every call, which give it numbers too. lengths: checks those of its calls.
    """

    def __init__(self, settings: Options, root: nn.Module | None, runner: nn.Module | None) -> None:
        self.plan: Plan | None = None if settings.plan is None else load_plan(settings.plan)
        self.root, self.runner, self.strict = root, runner, settings.strict
        self.callers: Callers = AttachedCallers() if self.plan is None else _callers(self.plan)
        self.caller = root if self.plan is not None else self.callers.among(running())
        self.inputs: list[Budget | Number] = []
        self.masks = AskedMasks(strict=settings.strict)
        self.lengths: CallLengths | None = None
        self.is_told_of_calls = False

    @property
    def is_whole(self) -> bool:
        """Whether the graph is of the model as a whole, or of something that is no module."""
        return self.runner is self.root

    @cached_property
    def inside(self) -> str:
        """Name of the module that runs the graph, with its layer left open."""
        name = "" if self.is_whole else self._names.get(id(self.runner), "")
        return ".".join(OTHER_LAYER if part.isdecimal() else part for part in name.split("."))

    @cached_property
    def _parts(self) -> NamedParts | None:
        return None if self.root is None else NamedParts(self.root, self.plan)

    @property
    def _names(self) -> dict[int, str]:
        return {} if self._parts is None else self._parts.names

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {} if self.root is None else modules_of(self.root)

    @cached_property
    def model(self) -> Model:
        """What the passes are told."""
        names = self._names
        if not self.is_whole and self.runner is not None:
            names = {
                key: ".".join(filter(None, (self.inside, name)))
                for key, name in names_of(self.runner).items()
            }
        layouts = self._layouts()
        lengths = [k.before + math.prod(k.grid) + k.after for k in layouts]
        if self.plan is not None:
            lengths += [site.tokens for site in self.plan.sites.values()]
        totals = () if self.is_whole else tuple(dict.fromkeys(lengths))
        sides = {(k.before > 0, k.after > 0) for k in layouts} - {(False, False)}
        called = self.caller is not None and arguments_of(self.caller) is not None
        return Model(names, self.known, self.inside, totals, called, frozenset(sides), asked=True)

    def _layouts(self) -> list[Known]:
        """How the tokens of all calibrated sites of the model lay."""
        planned = () if self.plan is None else map(self.plan.known, self.plan.sites)
        attached = (facts.known for facts in self._facts())
        return [known for each in (*planned, *attached) for known in each]

    def _facts(self) -> Iterator[Facts]:
        """What modules of the model have that a plan is attached to."""
        for module in () if self.root is None else self.root.modules():
            yield from (facts for _, facts in module.__dict__.get(ATTACHED, ()))

    def known(self, name: str) -> Sequence[Known]:
        """How the tokens of a site lay when it was calibrated."""
        module = self._module(name)
        nth = module_of_site(name)[1]
        if module is not None:
            for number, facts in module.__dict__.get(ATTACHED, ()):
                if number == nth:
                    found: tuple[Known, ...] = facts.known
                    return found
        if self.plan is None:
            return self._known_of_others(name)
        planned = self._planned(self._real(name))
        return () if planned is None else self.plan.known(planned)

    def _known_of_others(self, name: str) -> Sequence[Known]:
        """As `known`, of a module without a budget among others that have one."""
        plan = self._attached_plan
        names = () if plan is None else sorted(alike(name, plan.sites))
        found = (known for each in names if plan is not None for known in plan.known(each))
        return tuple(dict.fromkeys(found))

    @cached_property
    def _attached_plan(self) -> Plan | None:
        """The plan whose budgets the modules of the model that is called bring along."""
        return attached_to(self.caller)

    def is_replaced(self, site: Site) -> bool:
        """Whether a site's module has no budget and others in its place have.

        It may have come where one was, and that one may come back, in the same graph: no guard
        would tell them apart.
        """
        if self.plan is not None or not self.to_be_split(site):
            return False
        return self.planned_heads(site) == site.all_heads

    def attached(self, site: Site) -> bool:
        """Whether a site's module brings a budget, which no mark in this graph shows."""
        module, nth = self._module(site.name), module_of_site(site.name)[1]
        return module is not None and any(n == nth for n, _ in module.__dict__.get(ATTACHED, ()))

    def is_by_module(self, site: Site) -> bool:
        """Whether the budget of a site depends on which module runs the graph."""
        if site.mark is not None:
            return False
        if self.attached(site) or self.is_replaced(site):
            return True
        return self.plan is not None and (not self.is_whole or not self.is_told(site))

    def is_planned(self, site: Site) -> bool:
        """Whether a plan decides about a site of the layer for which the graph is compiled."""
        if self.attached(site) or self.is_replaced(site):
            return True
        return self.plan is not None and self._planned(self._real(site.name)) is not None

    def to_be_split(self, site: Site) -> set[str]:
        """Names of the sites that the model's plan splits, and that a site of the graph may be.

        These are those of all layers that a graph may serve.
        """
        plan = self._attached_plan if self.plan is None else self.plan
        if plan is None:
            return set()
        names = alike(site.name, plan.sites) | set(plan.names_of([self._real(site.name)]).values())
        return {name for name in names if plan.sites[name].decision == "split"}

    def is_dense_by_plan(self, site: Site) -> bool:
        """Whether the model's plan leaves a site dense, in all layers that a graph may serve."""
        known = self.plan is not None or self._attached_plan is not None
        return known and self.is_planned(site) and not self.to_be_split(site)

    def is_told(self, site: Site) -> bool:
        """Whether the module that runs the graph tells, at any call, which one the site is in."""
        relative = self._relative(site.name)
        reached = module_path(site.node)
        if reached == relative or reached.endswith(f".{relative}") or not relative:
            return True
        return passes_through(site.node, relative) or self._at(reached) is self._module(site.name)

    def tells(self, gm: fx.GraphModule) -> list[Told]:
        """What the call of the model tells of the grid of its tokens; the graph gets inputs."""
        plan = self.plan
        plan_of = attached_to if plan is None else lambda model: plan
        told, inputs = told_by_model(gm, self.caller, self.runner, plan_of, strict=self.strict)
        self.inputs += inputs
        self.is_told_of_calls = bool(told)
        return told

    def takes_grid_for_granted(self, decision: Decision) -> bool:
        """Whether a site is split on the calibrated grid, as no call of the model is under way."""
        site = decision.site
        by_call = len(site.read_at_call) > (site.kept is not None)
        if not decision.split or self.is_told_of_calls or site.sources or by_call:
            return False
        return any(known.sources for known in self.known(site.name))

    def is_in_forward(self) -> bool:
        """Whether the model runs that the part is of, though it is not being called."""
        model = self.callers.among(forwards_under_way())
        return model is not None and arguments_of(model) is None

    def settle(self, gm: fx.GraphModule) -> None:
        """Take inputs that nothing uses out of the graph, and put the others behind all others."""
        self._settle_own(gm)
        self.masks.settle(gm)

    def _settle_own(self, gm: fx.GraphModule) -> None:
        if not self.inputs:
            return
        used = []
        for each in self.inputs:
            graph = each.node.graph
            if each.node.users:
                graph.find_nodes(op="placeholder")[-1].append(each.node)
                used.append(each)
            else:
                graph.erase_node(each.node)
        self.inputs = used
        gm.recompile()

    def watch_lengths(
        self, gm: fx.GraphModule, decisions: Sequence[Decision], graph: Graph
    ) -> None:
        """Have grids and lengths of calls checked. graph: knows what was compiled, later.

        Raises:
            PlanError: a length that is too far off already.
        """
        plan = self._attached_plan if self.plan is None else self.plan
        if plan is None:
            return

        def owner() -> nn.Module | None:
            return None if graph.owner is None else graph.owner()

        told = {each.node for each in self.inputs}
        by_plan = {d.site.name for d in decisions if self.plan and not self.is_by_module(d.site)}
        names = graph.names or plan.names_of([d.site.name for d in decisions])
        self.lengths = CallLengths(gm, decisions, plan, names, told, owner, by_plan)

    def operand(self, gm: fx.GraphModule, site: Site) -> fx.Node:
        """A node for the budget (2, H) of the module that is running when the graph is called."""
        places = gm.graph.find_nodes(op="placeholder")
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        with gm.graph.inserting_before(first):
            node = gm.graph.placeholder(f"freqopt_budget_of_module_{len(places)}")
        zeros = torch.zeros(2, self._heads(site), device=site.device, dtype=torch.float32)
        mode = fake_mode(gm.graph)
        node.meta["example_value"] = zeros if mode is None else mode.from_tensor(zeros)
        relative, nth = self._relative(site.name), module_of_site(site.name)[1]
        self.inputs.append(Budget(relative, nth, zeros, node))
        return bring(node, site.node.graph)

    def _heads(self, site: Site) -> int:
        """For how many heads budgets are: all of the model's, where processes share them."""
        return self.planned_heads(site) or site.all_heads

    def planned_heads(self, site: Site) -> int:
        """For how many heads the budget of a site's module is; 0 where it has none."""
        module, nth = self._module(site.name), module_of_site(site.name)[1]
        own = None if module is None else module.__dict__.get(attribute_of(nth))
        if isinstance(own, Tensor):
            return own.shape[-1]
        if self.plan is None:
            names, plan = self.to_be_split(site), self._attached_plan
            return 0 if plan is None or not names else plan.sites[min(names)].heads
        planned = self._planned(self._real(site.name))
        return 0 if planned is None else self.plan.sites[planned].heads

    def largest_chunk(self) -> int:
        """The largest chunk that any module of the model brings, or the plan has."""
        own = (facts.largest_chunk for facts in self._facts())
        planned = () if self.plan is None else map(self.plan.largest_chunk, self.plan.sites)
        return max((*own, *planned), default=0)

    def graph(self, gm: fx.GraphModule) -> fx.GraphModule:
        """The graph to compile: a copy if it takes budgets, as Dynamo wants its own inputs back."""
        nodes = [*(each.node for each in self.inputs), *self.masks.nodes]
        if not nodes:
            return gm
        taken, _ = copied(gm)
        for node in nodes:
            node.replace_all_uses_with(next(iter(gm.graph.nodes)))
            gm.graph.erase_node(node)
        return taken

    @property
    def examples(self) -> list[Any]:
        """Its inputs and those of its masks in the call that the graph is compiled for."""
        return [*(each.example for each in self.inputs), *self.masks.examples]

    @cached_property
    def feeding(self) -> Feeding:
        """What the graph is given at every call, once its inputs are settled."""
        return Feeding(self.callers, self.plan, self.root, self._parts, self.inputs)

    def planned_in(self, module: object) -> set[str]:
        """The plan's names of the sites in a module of the model; of all where it is no part."""
        if self.plan is None or not isinstance(module, nn.Module) or module is self.root:
            return set() if self.plan is None else set(self.plan.sites)
        inside = {id(each) for each in module.modules()}
        matched = {} if self._parts is None else self._parts.matched
        paths = {matched.get(name) for name, m in self._modules.items() if id(m) in inside}
        found = {name for name in self.plan.sites if module_of_site(name)[0] in paths}
        return found or set(self.plan.sites)

    def _planned(self, name: str) -> str | None:
        """The plan's name of a site."""
        assert self.plan is not None
        if self._parts is None:
            return self.plan.names_of([name]).get(name)
        return self._parts.planned(name)

    def _real(self, name: str) -> str:
        """The name of a site with the number of the layer for which the graph is compiled."""
        if self.is_whole:
            return name
        path, nth = module_of_site(name)
        inner = (self._names.get(id(self.runner), ""), path[len(self.inside) :].lstrip("."))
        return site_name(".".join(filter(None, inner)), 0, nth)

    def _relative(self, name: str) -> str:
        """Name of a site's module in the module that runs the graph."""
        path = module_of_site(name)[0]
        return path if self.is_whole else path[len(self.inside) :].lstrip(".")

    def _at(self, path: str) -> nn.Module | None:
        """The module at a place in the one that runs the graph, where it may have others too."""
        runner = self.root if self.is_whole else self.runner
        places = () if runner is None else runner.named_modules(remove_duplicate=False)
        return next((module for name, module in places if plain_path(name) == path), None)

    def _module(self, name: str) -> nn.Module | None:
        return self._modules.get(module_of_site(self._real(name))[0])


class AttachedCallers:
    """The models that a plan is attached to: the innermost that is running counts."""

    is_noted = True

    def among(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The model, None if it is not being called."""
        return next((each for each in modules if SELECTS in each._forward_pre_hooks), None)


def _callers(plan: Plan) -> PlannedCallers:
    return PlannedCallers(module_of_site(name)[0] for name in plan.sites)


def part_of_model(settings: Options) -> Part:
    """The part of a model for which a backend is called right now.

    Raises:
        InputError: a backward pass compiles it, and it is not known of which model it is.
        PlanError: the plan has the order of tokens of another model.
    """
    modules = list(running())
    if not modules:
        return Part(settings, None, None)
    root = modules[-1]
    if settings.plan is not None:
        plan = load_plan(settings.plan)
        caller = _callers(plan).among(modules)
        if caller is None and in_backward():
            caller = model_before(root)
            if caller is None:
                raise InputError(REENTRANT.format(part=type(root).__name__))
        root = caller or root
        plan.check_order(root)
    return Part(settings, root, modules[0])
