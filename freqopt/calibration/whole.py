"""The whole model timed, dense and split, as the user's clock sees it: eager, compiled, in graphs.

A site may be faster by itself and the model not: launches are hidden behind other work or they are
not, and a compiled model has fewer of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from freqopt.calibration.measure.clock import compare_runs, launched_and_done
from freqopt.calibration.measure.requests import Dense, Split, Thresholds
from freqopt.calibration.search.verify import thresholds_key
from freqopt.calibration.search.workbench import Workbench
from freqopt.plan.measured import ModelClock
from freqopt.plan.plan import Plan

logger = logging.getLogger(__name__)

MODES: dict[ModelClock, str | None] = {"compiled": None, "graphs": "reduce-overhead"}
"""Ways to run a compiled model, with the mode of torch.compile that runs it so."""

CLOCKS = ("auto", "eager", *MODES)

LAUNCH_BOUND = 0.9
"""Share of a run's time until all of it is launched, from which the GPU waits for launches."""


class ModelTimes(NamedTuple):
    """Time of a run of the whole model, dense and split, in ms.

    clock: how it ran. note: what the plan should say.
    """

    dense: float
    split: float
    clock: ModelClock = "eager"
    note: str = ""

    @property
    def slower(self) -> str:
        """Why nothing should be split; empty where splitting is faster."""
        if self.split < self.dense:
            return ""
        return (
            f"the whole model is no faster split: as timed, {self.split:.4g} ms against "
            f"{self.dense:.4g} ms dense"
        )


class DensePass(NamedTuple):
    """A dense run of the model on a GPU: seconds until Python has launched it, and in all."""

    launched: float
    seconds: float

    @property
    def launch_bound(self) -> bool:
        """Whether the time that launching takes is part of what attention costs.

        Not where the GPU has more to do than the model's launches take, so that they are hidden
        behind it: then it is busy all the time.
        """
        return self.launched > LAUNCH_BOUND * self.seconds


def dense_pass(bench: Workbench) -> DensePass | None:
    """A dense run, timed; None on a CPU, where none is dear. Its output is a reference's."""
    if not bench.runner.on_gpu:
        return None
    first, second = bench.samples.fit[0], bench.samples.held_out[0]

    def look() -> tuple[float, float]:
        bench.reference(first).compute()  # the compiler writes the graph down
        known = bench.reference(second).known
        return launched_and_done(
            lambda: (
                bench.runner.run(second, Dense()) if known else bench.reference(second).compute()
            )
        )

    return DensePass(*bench.kept("a dense pass", look))


def model_times(
    bench: Workbench, thresholds: Thresholds, clock: str, plan: Callable[[], Plan]
) -> ModelTimes | None:
    """Times of the whole model; None where there is no clock, or nothing is split.

    plan: makes the plan that has these thresholds, for the clocks that compile. A model that does
    not compile is timed in eager mode, and the note says so.
    """
    if not bench.survey.timings or not thresholds:
        return None
    key = thresholds_key(f"model times {clock}", thresholds)
    return ModelTimes(*bench.kept(key, lambda: _timed(bench, thresholds, clock, plan)))


def _timed(
    bench: Workbench, thresholds: Thresholds, clock: str, plan: Callable[[], Plan]
) -> ModelTimes:
    runner, note = bench.runner, ""
    middle = bench.samples.held_out[len(bench.samples.held_out) // 2]
    if clock in MODES:
        try:
            with runner.compiled_calls(middle, plan(), MODES[clock]) as (dense, split):
                for run in (dense, split):
                    run()  # compiles
                    run()  # records graphs
                times = compare_runs(dense, split, runner.team)
            return ModelTimes(*times, clock, f"the whole model was timed {_words(clock)}")
        except Exception as error:
            logger.warning("the model is timed in eager mode, it does not compile: %s", error)
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            note = (
                f"the whole model was timed in eager mode, as compiling it failed: "
                f"{type(error).__name__}: {first}"
            )
    request = Split(thresholds)
    times = compare_runs(
        lambda: runner.run(middle, Dense()), lambda: runner.run(middle, request), runner.team
    )
    return ModelTimes(*times, note=note)


def _words(clock: str) -> str:
    return "compiled" if clock == "compiled" else "compiled, in CUDA graphs"
