"""Runs the model under calibration: evaluation mode, seeded, recorders for its attention."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from freqopt.calibration.given import GivenInputs, copied_arguments
from freqopt.calibration.measure.in_pieces import EagerRecorders
from freqopt.calibration.measure.recorder import Desk, recording_backend
from freqopt.calibration.measure.replay import Captured, Held, Tape
from freqopt.calibration.measure.requests import Dense, Request, Result
from freqopt.calibration.misfits import misfits_told
from freqopt.calibration.outputs import output_tensors, some_tensors
from freqopt.calibration.randomness import generators_kept, random_state, seeded
from freqopt.calibration.samples import Sample, SampleSet
from freqopt.calibration.team import Team
from freqopt.capture.call_layouts import BySizes
from freqopt.capture.eager import uncompiled
from freqopt.capture.exchanges import show_exchanges
from freqopt.capture.given_ints import with_given_ints
from freqopt.capture.looking import weak_backend
from freqopt.capture.modules import names_of
from freqopt.capture.step_caches import without_step_caches
from freqopt.capture.under_way import arguments_by_name
from freqopt.errors import FreqoptError, unwrapped
from freqopt.given_grid import contradiction
from freqopt.grid import Grid
from freqopt.passes.find import Grids
from freqopt.passes.site import Known
from freqopt.plan.plan import Plan
from freqopt.positions import Layout

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 256


class Runner:
    """A model whose attention does what is asked for; use as ``with opened(...) as runner``.

    passes: runs of the model so far; of runs of a part of it their shares. notes: what the plan
    should say.
    """

    def __init__(self, model: nn.Module, samples: SampleSet, grid: Grid | None, seed: int) -> None:
        self.model, self.samples, self.seed = model, samples, seed
        self._desk, self._given = Desk(), GivenInputs()
        grids = Grids(grid, tuple(samples.grids))
        self._graphs, self._in_pieces = 0, False
        self._asked: set[tuple[str, Known]] = set()
        self.passes = 0.0
        self.notes: list[str] = []
        self._grid = grid
        show_exchanges()
        self._backend = self._counting(recording_backend(self._desk, grids, names_of(model)))
        self.compiled = torch.compile(model, dynamic=False, backend=weak_backend(self._backend))
        self._eager = EagerRecorders(model, self._desk, grids, samples.timestep_name)

    @property
    def on_gpu(self) -> bool:
        """Whether the model's parameters are on a GPU."""
        first = next(self.model.parameters(), None)
        return first is not None and first.is_cuda

    @property
    def dense_sites(self) -> dict[str, str]:
        """Attention in the graphs seen so far that cannot be split, with the reason."""
        return dict(self._desk.dense_sites)

    @property
    def layouts(self) -> dict[str, list[Any]]:
        """How the tokens of the sites seen so far lay, as plain lists."""
        return self._desk.layouts.packed()

    @property
    def team(self) -> Team:
        """The processes that share the heads of the model, once it has run."""
        return self._desk.team

    def look(self) -> Team:
        """Run the model on a sample if other processes may share its heads: which of them do.

        Raises:
            CalibrationError: they were given other samples.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.team
        first = self.samples.fit[0]
        with self._ready(), self._given.of(first) as (args, kwargs):
            self.model(*args, **kwargs)  # hooks that share tensors out set themselves up at first
        self.run(first, Dense())
        given = [(s.args, s.kwargs) for s in (*self.samples.fit, *self.samples.held_out)]
        self.team.agree(given, "samples")
        return self.team

    def run(self, sample: Sample, request: Request) -> Result:
        """What one call of the model shows, its output among it."""
        others = (*self.samples.fit, *self.samples.held_out)
        with (
            misfits_told(self.model, sample, others),
            self._asking(request) as result,
            self._ready(),
            self._given.of(sample) as given,
        ):
            self._desk.bucket = self.samples.bucket(sample)
            result.output = some_tensors(self._call(*given))
        self.passes += 1.0
        return result

    def replays(self, sample: Sample, base: Request) -> Replays:
        """Runs of a sample that are as `base` says up to a site, and as asked for behind it."""
        return Replays(self, sample, base)

    def hold(self, sample: Sample) -> Held | None:
        """A sample held at the start of the graph that serves it; None where that cannot be.

        The first time, whether running a graph from a cut gives what the whole gives is tried.
        """
        if (not self._graphs and not self._in_pieces) or not self._given.is_tried(sample):
            self.run(sample, Dense())  # what came before is from a checkpoint
        held = None if self._given.writes(sample) else self._captured(sample)
        if held is None:
            return None
        staged = held.staged
        if staged.usable is None:
            usable = all(self.team.all(bool(staged.cuts) and self._tried(sample, held)))
            staged.usable = usable
            if not usable:
                logger.info("the model's graph cannot be run in part, so it is run whole")
            held = self._captured(sample) if usable else None
        return held if held is not None and held.staged.usable else None

    def resume(self, sample: Sample, held: Held, request: Request, site: str | None) -> Result:
        """Run on from what is held: to the cut before a site, or (None) to the model's output."""
        at = held.staged.share_behind(held.at)
        with self._asking(request) as result, self._ready():
            self._desk.bucket = self.samples.bucket(sample)
            if site is None:
                result.output = held.finish()
            else:
                held.advance(held.staged.cuts[site])
        self.passes += at - (0.0 if site is None else held.staged.share_behind(held.at))
        return result

    @contextmanager
    def compiled_calls(
        self, sample: Sample, plan: Plan, mode: str | None
    ) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
        """Calls of the model compiled as a user would, dense, and split by a plan.

        mode: of torch.compile.
        """
        from freqopt.backend import freqopt_backend

        dense = torch.compile(self.model, dynamic=False, mode=mode)
        options: Any = {"plan": plan, "mode": mode}
        split = torch.compile(self.model, dynamic=False, backend=freqopt_backend, options=options)
        with self._ready(), self._given.of(sample) as (args, kwargs):
            yield lambda: dense(*args, **kwargs), lambda: split(*args, **kwargs)

    def _captured(self, sample: Sample) -> Held | None:
        """What a sample gives to the model's graph, which is not run."""
        if self._in_pieces or not self._graphs:
            return None
        self._desk.tape = Tape(ends=True)
        try:
            with self._asking(Dense()), self._ready():
                self._call(sample.args, sample.kwargs)
        except Captured as captured:
            return Held(captured.staged, captured.arguments)
        finally:
            self._desk.tape = None
        return None

    def _tried(self, sample: Sample, held: Held) -> bool:
        """Whether a run from the first cut gives, bit by bit, what a whole run gives.

        Not where that draws random numbers, which would be others from another cut.
        """
        self._desk.tape = tape = Tape(ends=False)
        try:
            with self._asking(Dense()), self._ready():
                before = random_state()
                whole = output_tensors(self._call(sample.args, sample.kwargs))
                drawn = not torch.equal(before, random_state())
        finally:
            self._desk.tape = None
        self.passes += 1.0
        if drawn or tape.graphs != 1 or not held.staged.find_outputs(whole, tape.returned):
            return False
        tape.returned.clear()
        first = min(held.staged.cuts, key=lambda site: held.staged.cuts[site])
        self.resume(sample, held, Dense(), first)
        again = self.resume(sample, held, Dense(), None).output
        return not held.spoiled and all(map(torch.equal, whole, again))

    def generate(self, pipeline: Callable[[], Any], request: Request) -> tuple[Any, Result]:
        """What a pipeline returns that calls the model, and what all those calls show."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._desk.bucket = self.samples.bucket_of_call(self.model, args, kwargs)
            self.model._compiled_call_impl = None
            try:
                return self._call(args, kwargs)
            finally:
                self.model._compiled_call_impl = call

        before = self.model._compiled_call_impl
        try:
            with self._asking(request) as result, self._ready():
                self.model._compiled_call_impl = call
                return pipeline(), result
        finally:
            self.model._compiled_call_impl = before

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model with recorders in its graph; where it has no one graph, in eager mode."""
        if self._in_pieces:
            return self._eager(args, kwargs)
        if self._graphs:
            output = self.compiled(*args, **kwargs)
            self._explain(args, kwargs)
            return output
        breaks, restore, again = _breaks(), generators_kept(), copied_arguments((args, kwargs))
        try:
            output = self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if isinstance(getattr(error, "inner_exception", None), FreqoptError):
                raise
            logger.info("the model is measured in eager mode, it does not compile: %s", error)
        else:
            if self._is_whole() and _breaks() == breaks:
                self._explain(args, kwargs)
                return output
            logger.info("the model is measured in eager mode, its graph is in pieces")
        self._in_pieces = True
        self._desk.clear()
        restore()  # it ran already, as far as it could be compiled
        return self._eager(*again)

    def _explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find which ints among the arguments of a call the grids are that it brought.

        The compiler has them in its graph as constants, so the model runs once more, without it.
        """
        layouts = self._desk.layouts
        new = layouts.unexplained() - self._asked
        self._asked |= new
        if not new or with_given_ints(self.model, args, kwargs) is None:
            return
        found = self._eager.sources(args, kwargs)
        self.passes += 1.0
        told = arguments_by_name(self.model, args, kwargs)
        for name, layout in new:
            teller = BySizes(found.get(name, ()))
            if teller.sources and teller(told) == Layout(0, layout.grid, 0):
                layouts.explain(name, layout, teller.sources)

    def _is_whole(self) -> bool:
        return self._graphs == 1

    def _counting(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        def counting(gm: Any, example_inputs: Any) -> Any:
            self._graphs += 1
            said = contradiction(gm, self._grid)
            self.notes += [said] if said and said not in self.notes else []
            return backend(gm, example_inputs)

        return counting

    @contextmanager
    def _asking(self, request: Request) -> Iterator[Result]:
        """The recorders answer a request; afterwards they hold none of what it says."""
        desk = self._desk
        desk.request, desk.result = request, Result()
        try:
            yield desk.result
        finally:
            desk.request, desk.result = Dense(), Result()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with (
            unwrapped(),
            torch.no_grad(),
            seeded(self.seed),
            _many_recompiles(),
            uncompiled(self.model),
        ):
            yield


class Replays:
    """Runs of one sample with another request from a site on; sites in the order of the model.

    What is before a site is run once, where the model's graph allows it, else every time.
    """

    def __init__(self, runner: Runner, sample: Sample, base: Request) -> None:
        self.runner, self.sample, self.base = runner, sample, base
        self._held: Held | None = None
        self._begun = False

    def run(self, site: str, request: Request) -> Result:
        """A run that is as the base says before a site, and as the request says from there on.

        The request must say of earlier sites what the base does.
        """
        held = self._at(site)
        if held is None:
            return self.runner.run(self.sample, request)
        result = self.runner.resume(self.sample, held, request, None)
        if held.spoiled:
            held.staged.usable = False
            self._held = None
        return result

    def _at(self, site: str) -> Held | None:
        """What is alive before a site; None where runs must be whole."""
        held = self._held
        if not self._begun or (held and held.at > held.staged.cuts.get(site, -1) >= 0):
            self._begun, self._held = True, None
            held = self._held = self.runner.hold(self.sample)
        if held is None or site not in held.staged.cuts:
            return None
        self.runner.resume(self.sample, held, self.base, site)
        return held


@contextmanager
def opened(model: nn.Module, samples: SampleSet, grid: Grid | None, seed: int) -> Iterator[Runner]:
    """A runner; the model is in evaluation mode, without step caches, and left as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    _forget_compiled(model)  # Dynamo remembers what it gave up, under any backend
    try:
        with without_step_caches(model):
            yield Runner(model, samples, grid, seed)
    finally:
        for module in training:
            module.training = True
        _forget_compiled(model)


def _forget_compiled(model: nn.Module) -> None:
    """Drop what was compiled of the model.

    The recorders' graphs hold what was measured and count as recompilations.
    """
    code = getattr(model.forward, "__code__", None)
    if code is not None:
        torch._dynamo.eval_frame.remove_from_cache(code)


def _breaks() -> int:
    """How often the compiler has left a graph or skipped a function."""
    counters = torch._dynamo.utils.counters
    return sum(sum(counters[name].values()) for name in ("graph_break", "unimplemented"))


def _many_recompiles() -> Any:
    """Samples of many shapes each need their own graph; hitting the limit would skip sites."""
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            return torch._dynamo.config.patch({name: RECOMPILE_LIMIT})
    return nullcontext()
