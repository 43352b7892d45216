"""`freqopt.inspect`: what attention a model has, and what the backend would do about each.

The model is captured the way torch.compile captures it, with a backend that only looks, and run
once. It is run once more without the compiler to name the attention that no backend gets to see.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from freqopt.capture.call_grids import OneCall
from freqopt.capture.eager import uncompiled, written
from freqopt.capture.modules import (
    module_of,
    module_of_site,
    modules_of,
    names_of,
    running,
)
from freqopt.decisions import decide, grids_of
from freqopt.errors import unwrapped
from freqopt.options import Options, load_plan, parse_options
from freqopt.passes.decision import Decision
from freqopt.passes.find import Model
from freqopt.passes.manager import rewrite
from freqopt.passes.naming import plain_path, site_name
from freqopt.passes.site import Extent, Kind, Known
from freqopt.positions import grids_of_positions
from freqopt.telling.verdict import HOOKED, by_hook

FULLGRAPH = (
    "compile with torch.compile(..., fullgraph=True), which refuses to break and says where the "
    "cause is; or change that line"
)

IN_PIECES = (
    "it can be split, but the model's graph is in pieces, and that of this attention does not show "
    "what its tokens are: make a plan with freqopt.calibrate(model, samples), which measures it, "
    "and compile with the plan or call freqopt.attach(model, plan)"
)

ATTENTION_FUNCTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward"}


@dataclass(frozen=True)
class InspectedSite:
    """One attention.

    Attributes:
        name: path of the module around it, with #1, #2 for further attention in the same module; it
            is what plans refer to.
        kind: what it attends over: self, joint, text in keys, cross or other.
        heads: number of query heads.
        head_dim: channels of a head.
        query_length: queries, in tokens.
        key_length: keys, in tokens.
        grid: extents (t, h, w) of the video tokens, from the slowest to the fastest axis; None if
            unknown.
        text_before: text tokens before the video.
        text_after: text tokens after it.
        eligible: whether it could be split, whatever its length.
        decision: what the backend would do, "split" or "dense"; without a plan if none was given.
        reason: why it stays dense, or can be split.
        ranks: processes that share its heads out, of which `heads` are here.
    """

    name: str
    kind: Kind
    heads: int
    head_dim: int
    query_length: int
    key_length: int
    grid: tuple[int, int, int] | None
    text_before: int
    text_after: int
    eligible: bool
    decision: str
    reason: str
    ranks: int = 1


@dataclass(frozen=True)
class GraphBreak:
    """A place where torch.compile leaves the graph.

    Attributes:
        reason: torch.compile's own words.
        where: file and line.
        advice: what to do.
    """

    reason: str
    where: str
    advice: str = FULLGRAPH


@dataclass(frozen=True)
class Inspection:
    """All attention of a model that a backend sees, and what it does not see.

    Attributes:
        sites: attention in the graphs, in the order of execution.
        graph_breaks: where torch.compile left a graph.
        graphs: number of graphs the model was captured in; 1 is best.
        unseen: modules whose attention ran outside all graphs, where no backend can do anything
            about it.
        positions: inputs that hold the positions of tokens (such as img_ids), and the grid that
            these are in raster order on.
        imbalance: with a plan, how much longer attention takes on ranks that share the heads than
            it would with equal ones, as they are and after `freqopt.parallel.balance`; None where
            no heads are shared.
    """

    sites: list[InspectedSite]
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    graphs: int = 1
    unseen: list[str] = field(default_factory=list)
    positions: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    imbalance: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        split = sum(site.decision == "split" for site in self.sites)
        return (
            f"Inspection({len(self.sites)} sites, {split} to be split, {self.graphs} graphs, "
            f"{len(self.graph_breaks)} graph breaks)"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        split = sum(site.decision == "split" for site in self.sites)
        eligible = sum(site.eligible for site in self.sites)
        lines = [
            f"{len(self.sites)} attention sites in {self.graphs} graph(s): {eligible} can be "
            f"split, {split} will be",
            *_table(self.sites),
        ]
        if not self.sites:
            lines.append("no attention was found in any graph")
        if any(site.grid is None and not site.eligible for site in self.sites):
            lines += [
                f"{name} holds the positions of a {'x'.join(map(str, grid))} grid, which no graph "
                f"shows: pass grid={grid}"
                for name, grid in self.positions.items()
            ]
        if self.imbalance is not None:
            before, after = self.imbalance
            lines.append(
                f"by the plan, attention takes {before:.2f} times as long as with equal ranks; "
                f"freqopt.parallel.balance would make that {after:.2f}"
            )
        for broken in self.graph_breaks:
            lines += ["", f"graph break at {broken.where}: {broken.reason}", f"  {broken.advice}"]
        if self.unseen:
            grouped = _grouped([(name or "the model itself", ()) for name in self.unseen])
            names = ", ".join(name for name, _ in grouped)
            lines += ["", f"runs outside all graphs, where no backend sees it: {names}"]
            hooked = any(broken.advice == HOOKED for broken in self.graph_breaks)
            lines.append(f"  {HOOKED if hooked else FULLGRAPH}")
        return "\n".join(lines)


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
        InputError: `model` is not a module.
    """
    inner = module_of(model, "inspect")
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
    capture = _Capture(settings, inner)
    if capture.plan is not None:
        capture.plan.check_order(inner)
    with torch.no_grad(), _random_state_kept(), uncompiled(inner):
        if _is_one_of_several():
            inner(*args, **kwargs)  # hooks that share tensors out set themselves up at first
        with unwrapped(), _breaks_recorded(capture), _compiled_forgotten(inner):
            torch.compile(inner, backend=capture, dynamic=False)(*args, **kwargs)
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
        model = Model(self.names, self._known, inside)
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


@contextmanager
def _breaks_recorded(capture: _Capture) -> Iterator[None]:
    """Collect why torch.compile left the graph while the body runs."""
    from torch._dynamo import utils

    before = len(utils.graph_break_reasons)
    skipped_before = dict(utils.counters["unimplemented"])
    yield
    known: set[tuple[str, str]] = set()
    for found in utils.graph_break_reasons[before:]:
        reason, frame = _first_line(found.reason), _user_frame(found.user_stack)
        if (reason, frame) not in known:
            known.add((reason, frame))
            hooked = by_hook(reason, list(found.user_stack or ()))
            capture.breaks.append(GraphBreak(reason, frame, HOOKED if hooked else FULLGRAPH))
    skipped = utils.counters["unimplemented"]
    for text in [t for t in skipped if skipped[t] > skipped_before.get(t, 0)]:
        reason = _first_line(text)
        if reason not in {r for r, _ in known}:
            known.add((reason, ""))
            where = "a function that therefore runs without the compiler"
            capture.breaks.append(GraphBreak(reason, where))


def _first_line(reason: object) -> str:
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    explanation = next((x for x in lines if x.startswith("Explanation:")), "")
    return " ".join(filter(None, [lines[0] if lines else "unknown", explanation]))


def _user_frame(stack: Sequence[Any] | None) -> str:
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "an unknown place"


@contextmanager
def _compiled_forgotten(model: nn.Module) -> Iterator[None]:
    """Drop what was compiled for looking: it would count as a recompilation of the real thing."""
    from torch._dynamo.eval_frame import remove_from_cache

    try:
        yield
    finally:
        for module in model.modules():
            code = getattr(module.forward, "__code__", None)
            if code is not None:
                remove_from_cache(code)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


class _Watch(TorchFunctionMode):
    """Notes the module that is running whenever attention is computed."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.found: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ATTENTION_FUNCTIONS:
            self.found[self.running[-1] if self.running else ""] = None
        return func(*args, **(kwargs or {}))


def attention_modules(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Paths of the modules that compute attention while `run` runs the model eagerly."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(enter(name))
            stack.callback(handle.remove)
            after = module.register_forward_hook(lambda *_: _leave(running), always_call=True)
            stack.callback(after.remove)
        watch = _Watch(running)
        with watch, torch.compiler.set_stance("force_eager"):
            run()
    return [plain_path(name) for name in watch.found]


def _leave(running: list[str]) -> None:
    running.pop()


def _table(sites: Sequence[InspectedSite]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, (site,) in _grouped([(s.name, (_anonymous(s),)) for s in sites]):
        lengths = str(site.query_length)
        if site.key_length != site.query_length:
            lengths += f" -> {site.key_length}"
        text = " + ".join(
            part
            for part in (
                f"{site.text_before} before" if site.text_before else "",
                f"{site.text_after} after" if site.text_after else "",
            )
            if part
        )
        grid = "x".join(map(str, site.grid)) if site.grid else "-"
        here = str(site.heads) if site.ranks == 1 else f"{site.heads} of {site.ranks} ranks"
        heads = f"{here} x {site.head_dim}" if site.heads else "-"
        rows.append(
            (name, site.kind, heads, lengths, grid, text or "-", site.decision, site.reason)
        )
    if not rows:
        return []
    head = ("site", "kind", "heads", "tokens", "grid", "text", "decision", "reason")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _anonymous(site: InspectedSite) -> InspectedSite:
    return InspectedSite(**{**asdict(site), "name": ""})


def _grouped(items: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Equal items of numbered names in one: blocks.0.attn, blocks.1.attn as blocks.0-1.attn."""
    groups: dict[Any, list[str]] = {}
    for name, item in items:
        pattern = re.sub(r"\d+", "*", name, count=1)
        groups.setdefault((pattern, item), []).append(name)
    result = []
    for (pattern, item), names in groups.items():
        if len(names) == 1:
            result.append((names[0], item))
            continue
        numbers = sorted({int(m.group()) for n in names if (m := re.search(r"\d+", n))})
        result.append((pattern.replace("*", _ranges(numbers), 1), item))
    return result


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(parts)
