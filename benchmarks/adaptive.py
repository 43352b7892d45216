"""Does error stay put while the cost moves? `python -m benchmarks.adaptive`.

A plan is calibrated on inputs met while sampling. Then the model is called on videos of different
content: one still frame, motion, cuts between scenes, and still frames again, all with the same
noise. Thresholds spend what the content needs; the closed loop (the backend's option `adapt`)
tightens them where the probes measure more than the plan's bounds. For comparison the plan's
thresholds scaled at every call so that the cost is the same for all contents.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import freqopt
from benchmarks.calibration_bench import Bench, Budgets, open_bench, sampled_inputs
from benchmarks.common import RESULTS, environment, write
from freqopt.calibration_progress import Progress, open_progress
from freqopt.calibration_run import relative_error
from freqopt.calibration_samples import Sample, collect_samples
from freqopt.demo_settings import DTYPES, Settings, default_settings, load_model
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.passes.adapt import next_factor
from freqopt.plan import Plan

CONTENTS = ("still", "moving", "cuts", "still again")
TIME = 0.35
"""Share of noise in the inputs, which is the timestep."""

SCENES = 4
PINS = 5
"""Runs at most to find the factor at which a call has the density it is pinned to."""


def clip(content: str, seed: int, size: tuple[int, int, int], device: str) -> Tensor:
    """A video (1, 3, T, H, W) of one still frame, of motion, or of cuts between scenes."""
    scenes = [render_videos(1, *size, seed=SCENES * seed + i, device=device) for i in range(SCENES)]
    if content == "moving":
        return scenes[0]
    if content == "cuts":
        parts = [x.tensor_split(SCENES, 2)[i] for i, x in enumerate(scenes)]
        return torch.cat(parts, 2)
    return scenes[0][:, :, :1].expand_as(scenes[0])


def stream(settings: Settings, each: int) -> list[tuple[str, Sample]]:
    """Calls of the model, `each` of every content, with one noise for all."""
    size = (settings.frames, settings.height, settings.width)
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(settings.device)
    calls = []
    for content in CONTENTS:
        for seed in range(each):
            video = (1 - TIME) * clip(content, seed, size, settings.device) + TIME * noise
            timestep = torch.full((1,), TIME, device=settings.device)
            inputs = {"video": video.to(DTYPES[settings.dtype]), "timestep": timestep}
            calls.append((content, Sample((), inputs, TIME)))
    return calls


class Loop:
    """Factors of a plan's thresholds as `adapt` moves them: one for every head of every site."""

    def __init__(self, plan: Plan, bench: Bench) -> None:
        self.plan, self.bench = plan, bench
        self.chosen = split_budgets(plan)
        self.factors = {name: torch.ones(plan.sites[name].heads) for name in self.chosen}

    def budgets(self) -> Budgets:
        """Budgets of the next call."""
        return {name: rows * self.factors[name] for name, rows in self.chosen.items()}

    def learn(self) -> None:
        """Move the factors by what the probes of the call just made have measured."""
        bucket = self.bench.runner.session.bucket
        for name, (error,) in self.bench.runner.session.errors.items():
            bound = torch.tensor(self.plan.sites[name].bounds[bucket])
            self.factors[name] = next_factor(self.factors[name], error.cpu()[None], bound)


def split_budgets(plan: Plan) -> Budgets:
    """Budgets of the sites that a plan splits."""
    return {n: plan.budgets(n) for n, site in plan.sites.items() if site.decision == "split"}


def error_and_density(
    bench: Bench, chosen: Budgets, call: Sample, reference: list[Tensor]
) -> tuple[float, float]:
    """Relative error of the model's output in one call, and its density."""
    bench.choose(chosen)
    error = relative_error(bench.runner.run(call, "split"), reference)
    return error, bench.density()


def pinned(run: Callable[[float], tuple[float, float]], density: float) -> tuple[float, float]:
    """Error and density with the factor on all thresholds that has a density, by secants.

    run: from a factor to (error, density).
    """
    log, best = 0.0, (math.inf, math.inf)
    slope = -0.5  # of log density over log factor, to begin with
    before: tuple[float, float] | None = None
    for _ in range(PINS):
        found = run(math.exp(log))
        off = math.log(found[1] / density)
        if abs(off) < abs(math.log(best[1] / density)):
            best = found
        if abs(off) < 0.01:
            break
        if before is not None and abs(log - before[0]) > 1e-6:
            slope = min((off - before[1]) / (log - before[0]), -0.05)
        before, log = (log, off), log - off / slope
    return best


def measure(bench: Bench, plan: Plan, each: int, bars: Progress) -> list[dict[str, Any]]:
    """A row for each call of the stream."""
    chosen, loop = split_budgets(plan), Loop(plan, bench)
    rows: list[dict[str, Any]] = []
    with bars.phase("calls", len(CONTENTS) * each) as step:
        for content, call in stream(bench.settings, each):
            reference = bench.runner.run(call, "dense")
            error, density = error_and_density(bench, chosen, call, reference)
            adapted, spent = error_and_density(bench, loop.budgets(), call, reference)
            loop.learn()
            factor = min(float(f.min()) for f in loop.factors.values())
            rows.append(
                {"content": content, "error": error, "density": density, "factor": factor,
                 "adapted_error": adapted, "adapted_density": spent, "call": call,
                 "reference": reference}
            )  # fmt: skip
            step()
    middle = float(np.mean([row["density"] for row in rows]))
    with bars.phase("at equal density", len(rows)) as step:
        for row in rows:
            call, reference = row.pop("call"), row.pop("reference")

            def run(factor: float, call: Sample = call, wanted: Any = reference) -> Any:
                scaled = {name: factor * found for name, found in chosen.items()}
                return error_and_density(bench, scaled, call, wanted)

            row["pinned_error"], row["pinned_density"] = pinned(run, middle)
            step()
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means by content, and the largest over the smallest of them."""
    keys = ("density", "error", "adapted_density", "adapted_error", "pinned_density",
            "pinned_error")  # fmt: skip
    found = {
        content: {k: float(np.mean([r[k] for r in rows if r["content"] == content])) for k in keys}
        for content in CONTENTS
    }
    found["largest / smallest"] = {
        k: max(row[k] for row in found.values()) / min(row[k] for row in found.values())
        for k in keys
    }
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Density and error of every call of the stream."""
    import matplotlib
    from matplotlib.figure import Figure

    from freqopt.reporting_figures import BLUE, GREEN, GREY, STYLE

    ways = {"": ("the plan's thresholds", BLUE), "adapted_": ("the same, with adapt", GREEN),
            "pinned_": ("scaled to equal density", GREY)}  # fmt: skip
    at = np.arange(1, len(rows) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 3.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for ax, name, label in zip(
            panels, ("density", "error"), ("density (%)", "relative L2 error of the output (%)"),
            strict=True,
        ):  # fmt: skip
            for index, content in enumerate(CONTENTS):
                inside = [i for i, row in zip(at, rows, strict=True) if row["content"] == content]
                if index % 2:
                    ax.axvspan(min(inside) - 0.5, max(inside) + 0.5, color="#f0f2f5", lw=0)
                ax.text(
                    np.mean(inside), 1.01, content, ha="center", va="bottom", fontsize=9,
                    transform=ax.get_xaxis_transform(),
                )  # fmt: skip
            for prefix, (title, colour) in ways.items():
                values = [100 * row[prefix + name] for row in rows]
                ax.plot(at, values, "o-", ms=4, color=colour, label=title)
            ax.set(xlabel="call", ylabel=label, xlim=(0.5, len(rows) + 0.5))
            ax.set_ylim(0, 1.12 * max(100 * row[prefix + name] for row in rows for prefix in ways))
            ax.grid(axis="x", visible=False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate, run the stream; writes adaptive.json and adaptive.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="of the video (default: the demo's)")
    parser.add_argument("--steps", type=int, default=8, help="of the sampling of inputs")
    parser.add_argument("--samples", type=int, default=8, help="inputs to calibrate on")
    parser.add_argument("--each", type=int, default=4, help="calls of every content")
    parser.add_argument("--target-error", type=float, default=0.03)
    parser.add_argument("--random-weights", action="store_true", help="to try the benchmark out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    settings = default_settings(
        given.device, frames=given.frames, height=given.height, width=given.width,
        steps=given.steps, samples=given.samples, target_error=given.target_error,
        random_weights=given.random_weights,
    )  # fmt: skip
    started = time.perf_counter()
    model = load_model(settings)
    with open_progress(not given.quiet) as bars:
        (inputs,) = sampled_inputs(model, settings, [(settings.samples, 1000)], bars)
        samples = collect_samples(model, inputs)
        plan = freqopt.calibrate(
            model, inputs, target_error=settings.target_error, progress=not given.quiet
        )
        if not split_budgets(plan):
            raise SystemExit(
                f"calibration left every site dense at {plan.grids[0]} tokens and an error of "
                f"{plan.target_error:g}; nothing is left to adapt: take a larger video or target"
            )
        with open_bench(model, settings, samples, 0, bars) as bench:
            rows = measure(bench, plan, given.each, bars)
    result: dict[str, Any] = {
        "environment": environment(), "grid": list(plan.grids[0]), "target": plan.target_error,
        "timestep": TIME, "rows": rows, "summary": summary(rows),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    path = write("adaptive", result, given.out)
    draw(rows, path.with_suffix(".png"))
    for content, row in result["summary"].items():
        print(content + ": " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    print(f"wrote {path} and {path.with_suffix('.png').name} in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
