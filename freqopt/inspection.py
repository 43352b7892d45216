"""`freqopt.inspect`: what attention a model has, and what the backend would do about each.

The model is captured the way torch.compile captures it, with a backend that only looks, and run
once. It is run once more without the compiler to name the attention that no backend gets to see.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from freqopt.calibration.misfits import misfits_told
from freqopt.calibration.samples import Sample
from freqopt.capture.call_grids import OneCall
from freqopt.capture.call_layouts import told_by_sizes
from freqopt.capture.eager import uncompiled, written
from freqopt.capture.exchanges import show_exchanges
from freqopt.capture.looking import weak_backend
from freqopt.capture.modules import (
    module_of,
    module_of_site,
    modules_of,
    names_of,
    running,
)
from freqopt.capture.signatures import misfit_of
from freqopt.capture.step_caches import without_step_caches
from freqopt.capture.under_way import arguments_of
from freqopt.decisions import decide, grids_of
from freqopt.errors import InputError, unwrapped
from freqopt.given_grid import contradiction
from freqopt.inspection_found import GraphBreak, InspectedSite, Inspection
from freqopt.inspection_watch import (
    attention_modules,
    breaks_recorded,
    compiled_forgotten,
    random_state_kept,
)
from freqopt.options import Options, load_plan, parse_options
from freqopt.passes.decision import Decision
from freqopt.passes.find import Model
from freqopt.passes.manager import rewrite
from freqopt.passes.naming import site_name
from freqopt.passes.site import Extent, Known
from freqopt.positions import grids_of_positions

__all__ = ["GraphBreak", "InspectedSite", "Inspection", "attention_modules", "inspect"]

logger = logging.getLogger(__name__)

IN_PIECES = (
    "it can be split, but the model's graph is in pieces, and that of this attention does not show "
    "what its tokens are: make a plan with freqopt.calibrate(model, samples), which measures it, "
    "and compile with the plan or call freqopt.attach(model, plan)"
)


def inspect(
    model: nn.Module,
    *args: Any,
    grid: Any = None,
    grids: Any = None,
    plan: Any = None,
    min_tokens: Any = None,
    order: Any = None,
    before: Any = None,
    after: Any = None,
    **kwargs: Any,
) -> Inspection:
    """Find the attention of a model and say what the backend would do about it.

    Runs the model twice on the given inputs, as it is (training or evaluation mode, autocast)
    but without gradients, and leaves its parameters and the random state alone. Where several
    processes share its tokens, all of them call this, and it runs once more.

    Args:
        model: the model; one that was compiled already is inspected as it was before.
        args, kwargs: inputs of one call of the model.
        grid, grids, plan, min_tokens, order, before, after: as the backend's options: (t, h, w) in
            tokens, several of these, a plan or its path, tokens, "grid" or "content", and numbers
            of tokens. (Not typed, so that a dict of a model's own inputs may be passed as
            ``**inputs``.)

    Raises:
        OptionError: a malformed grid, grids or min_tokens.
        PlanError: a plan that cannot be read, or was made for another model.
        InputError: `model` is not a module, or does not take the inputs.
    """
    inner = module_of(model, "inspect")
    misfit = misfit_of(inner, args, kwargs)
    if misfit:
        raise InputError(f"the inputs do not fit the model: {misfit}")
    settings = parse_options(
        {
            "grid": grid,
            "grids": grids,
            "plan": plan,
            "min_tokens": min_tokens,
            "order": order,
            "before": before,
            "after": after,
        }
    )
    show_exchanges()
    capture = _Capture(settings, inner)
    if capture.plan is not None:
        capture.plan.check_order(inner)
    with (
        misfits_told(inner, Sample(args, kwargs), kind=InputError),
        torch.no_grad(),
        random_state_kept(),
        without_step_caches(inner),
        uncompiled(inner),
    ):
        if _is_one_of_several():
            inner(*args, **kwargs)  # hooks that share tensors out set themselves up at first
        with unwrapped(), breaks_recorded(capture.breaks), compiled_forgotten(inner):
            torch.compile(inner, backend=weak_backend(capture), dynamic=False)(*args, **kwargs)
        ran = attention_modules(inner, lambda: inner(*args, **kwargs))
        unseen = [name for name in ran if name not in capture.seen]
        sites = capture.sites
        if unseen or capture.breaks or capture.graphs != 1:
            graph, _ = written(inner, args, kwargs)
            sites = _of_pieces(capture, capture.described(graph))
    positions = grids_of_positions(args, kwargs)
    ranks = max((site.ranks for site in sites), default=1)
    uneven = None
    if capture.plan is not None and ranks > 1:
        from freqopt.parallel.costs import imbalances

        uneven = imbalances(capture.plan, ranks)
    return Inspection(sites, capture.breaks, capture.graphs, unseen, positions, uneven)


def _is_one_of_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_pieces(capture: _Capture, whole: Sequence[InspectedSite]) -> list[InspectedSite]:
    """Sites as the whole call shows them, with what the backend does about each in its piece.

    Sites that only a piece shows come last, as they are.
    """
    pieces = {site.name: site for site in capture.sites}
    sites = []
    for site in whole:
        piece = pieces.pop(site.name, None) or capture.served.get(site.name)
        if piece is not None and (piece.eligible or not site.eligible):
            sites.append(piece)
        elif site.eligible and site.decision == "split":
            sites.append(replace(site, decision="dense", reason=IN_PIECES))
        else:
            sites.append(site)
    return sites + list(pieces.values())


class _Capture:
    """A backend that describes the sites of every graph and runs it as it is.

    seen: paths of the modules of `model` whose attention is in some graph. served: by name, what is
    said of a site for all modules that its graph serves.
    """

    def __init__(self, settings: Options, model: nn.Module) -> None:
        self.settings = settings
        self.sites: list[InspectedSite] = []
        self.breaks: list[GraphBreak] = []
        self.graphs = 0
        self.seen: set[str] = set()
        self.served: dict[str, InspectedSite] = {}
        self.model, self.names = model, names_of(model)
        self.classes = {name: type(module) for name, module in modules_of(model).items()}
        self.plan = None if settings.plan is None else load_plan(settings.plan)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        contradicted = contradiction(gm, self.settings.grid)
        if contradicted:
            logger.warning("%s", contradicted)
        running_here = next(running(), self.model)
        inside = "" if running_here is self.model else self.names.get(id(running_here), "")
        sites = self.described(gm, inside, OneCall(gm, example_inputs))
        self.sites += sites
        for site in sites:
            path, nth = module_of_site(site.name)
            served = self._alike(path, inside)
            self.seen |= served
            for name in (site_name(each, 0, nth) for each in served):
                self.served.setdefault(name, replace(site, name=name))
        forward: Callable[..., Any] = gm.forward
        return forward

    def described(
        self, gm: fx.GraphModule, inside: str = "", call: OneCall | None = None
    ) -> list[InspectedSite]:
        """What is decided about each site of a graph, which a module of the model runs."""
        device = None
        if any(parameter.is_meta for parameter in self.model.parameters()):  # where it would run
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decide_here = functools.partial(decide, self.settings, guard=False, device=device)
        arguments = arguments_of(self.model)
        called = arguments is not None
        model = Model(self.names, self._known, inside, called=called, asked=True)
        if call is not None and call.inputs and arguments is not None and self.plan is not None:
            known = (k for name in self.plan.sites for k in self.plan.known(name))
            call.told += told_by_sizes(call.inputs[0], arguments, known)
        found = rewrite(gm, decide_here, None, grids_of(self.settings, call), model=model).decisions
        return [_described(decision) for decision in found]

    def _known(self, name: str) -> Sequence[Known]:
        if self.plan is None:
            return ()
        planned = self.plan.names_of([name]).get(name)
        return () if planned is None else self.plan.known(planned)

    def _alike(self, path: str, inside: str) -> set[str]:
        """Paths of the modules that a graph serves which one runs: the same in all of its kind."""
        if not inside or not path.startswith(inside):
            return {path}
        kind, relative = self.classes.get(inside), path[len(inside) :]
        return {name + relative for name, other in self.classes.items() if other is kind}


def _described(decision: Decision) -> InspectedSite:
    site = decision.site
    return InspectedSite(
        name=site.name,
        kind=site.kind,
        heads=site.heads,
        head_dim=site.head_dim,
        query_length=_number(site.query_length),
        key_length=_number(site.key_length),
        grid=None if site.grid is None else tuple(_number(e) for e in site.grid),  # type: ignore[arg-type]
        text_before=_number(site.text_before),
        text_after=_number(site.text_after),
        eligible=site.eligible,
        decision="split" if decision.split else "dense",
        reason=site.reason if decision.split else decision.reason,
        ranks=1 if site.share is None else site.share.ranks,
    )


def _number(extent: Extent) -> int:
    """An extent in this call; -1 where it depends on data."""
    if isinstance(extent, int):
        return extent
    return int(extent.node.hint) if extent.node.has_hint() else -1
