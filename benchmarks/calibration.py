"""What calibration buys, and which part of it: `python -m benchmarks.calibration`.

Budgets from every ingredient of calibration, from all but one, and one threshold for everything,
at equal densities: error of the model's output on unseen inputs, and PSNR of the sampled video
against the densely sampled one, same seed, every step split. Also whether the target holds on
unseen inputs, how long calibration takes, and how well the op's probes know their call's error.
Every number is written as soon as it is known, with the summary of what is there, so that a run
that is cut off leaves a file that pages are made from.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.calibration_bench import Bench, Generated, make_bench, sampled_inputs
from benchmarks.calibration_page import TARGETS
from benchmarks.calibration_plots import draw
from benchmarks.calibration_variants import (
    ALL,
    BY_VIDEO,
    UNIFORM,
    Variant,
    make_variants,
    variant_without_probes,
)
from benchmarks.common import RESULTS, environment, write
from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.ladder import ORDERS, THRESHOLDS
from freqopt.calibration.measure.requests import Measure, SiteThresholds, Split
from freqopt.calibration.phases import Calibration
from freqopt.calibration.runner import opened
from freqopt.calibration.samples import collect_samples
from freqopt.calibration.search.workbench import Workbench
from freqopt.demo.settings import DTYPES, Settings, default_settings, load_model
from freqopt.demo.video import decibels
from freqopt.plan.plan import Plan
from freqopt.progress import Progress, open_progress

CALIBRATION_SEED, UNSEEN_SEED = 1000, 5000
UNSEEN = 8
SETTINGS = ("frames", "height", "width", "steps", "dtype", "samples")
PROBED = 4
"""Unseen samples on which the op's probes are compared with the true error."""

TOLERANCE = 0.98
"""A density between this share of the wanted one and the wanted one counts as equal."""

MATCHES = 5
CURVE = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Factors of the lowest density wanted, at which calibrated and uniform errors are compared."""

BEYOND = 4.0
"""One more for uniform budgets: they need more to have the error of the densest calibrated ones."""


@dataclass
class Results:
    """What was measured so far, in a file that is written anew with every addition.

    densities: those wanted. name: of the file.
    """

    folder: Path
    densities: Sequence[float]
    name: str = "calibration"
    found: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, **more: Any) -> Path:
        """Add, sum up and write."""
        self.found.update(more)
        self.found["summary"] = summary(self.found, self.densities)
        self.found["seconds"] = time.perf_counter() - self.started
        return write(self.name, self.found, self.folder)


class Match(NamedTuple):
    """Thresholds, their videos and mean density, and the density that was predicted for them."""

    density: float
    request: Split
    videos: list[Generated]
    predicted: float


def at_density(bench: Bench, variant: Variant, density: float, predicted: float) -> Match:
    """Budgets whose density, over the steps of all videos, is at most the wanted one and near it.

    predicted: what to predict first. Where no trial is within the wanted density, the nearest.
    """
    tried: list[Match] = []
    for _ in range(MATCHES):
        request = variant.at(predicted)
        videos = [bench.video(request, seed) for seed in bench.videos]
        found = float(np.mean([video.density for video in videos]))
        tried.append(Match(found, request, videos, predicted))
        if TOLERANCE * density <= found <= density:
            break
        predicted = min(predicted * 0.99 * density / found, 1.0)
    within = [match for match in tried if match.density <= density]
    return (
        max(within, key=lambda match: match.density)
        if within
        else min(tried, key=lambda match: match.density)
    )


def compare(
    bench: Bench, variant: Variant, density: float, predicted: float
) -> tuple[dict[str, Any], float]:
    """A row of the comparison, and what was predicted for its budgets."""
    match = at_density(bench, variant, density, predicted)
    error, _ = bench.error(match.request)
    mse = float(np.mean([10 ** (-video.psnr / 10) for video in match.videos]))
    row = {
        "variant": variant.name,
        "wanted_density": density,
        "density": match.density,
        "cost": float(np.mean([video.cost for video in match.videos])),
        "error": error,
        "psnr": decibels(4.0 * mse),
        "psnrs": [video.psnr for video in match.videos],
    }
    print(
        f"density {row['density']:6.1%}  cost {row['cost']:6.1%}  error {error:.4f}  "
        f"PSNR {row['psnr']:5.1f} dB  {variant.name}",
        flush=True,
    )
    return row, match.predicted


def curve(bench: Bench, variant: Variant, densities: Sequence[float]) -> list[tuple[float, float]]:
    """(density, error) on the unseen samples, those with everything exact left out."""
    found = [bench.error(variant.at(density)) for density in densities]
    return sorted((density, error) for error, density in found if error > 0.0)


def density_ratio(ours: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> Any:
    """Our density over the other's at equal error, geometric mean where both are known."""
    density, error = np.log(np.array(other)).T
    ratios = [
        math.log(d) - float(np.interp(math.log(e), error[::-1], density[::-1]))
        for d, e in ours
        if error.min() <= math.log(e) <= error.max()
    ]
    return math.exp(float(np.mean(ratios))) if ratios else None


def probe_agreement(bench: Bench, plan: Plan) -> dict[str, float]:
    """How well probes know the error of their call, at the plan's budgets (nearest rungs)."""
    true, probe = [], []
    for unseen in bench.unseen.fit[:: max(1, len(bench.unseen.fit) // PROBED)]:
        bucket = bench.unseen.bucket(unseen)
        for reading in bench.runner.run(unseen, Measure()).readings:
            site = plan.sites[reading.site]
            if site.decision == "dense":
                continue
            for head, threshold in enumerate(site.budgets[bucket].threshold):
                rung = int(np.abs(np.log(THRESHOLDS) - math.log(max(threshold, 1e-9))).argmin())
                true.append(math.sqrt(float(reading.curves["own"][0, rung, head])))
                probe.append(math.sqrt(float(reading.curves["probe"][0, rung, head])))
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (true, probe)])
    return {
        "calls": len(true),
        "rank_correlation": float(np.asarray(np.corrcoef(ranks))[0, 1]),
        "mean_ratio": float(np.mean(np.array(probe) / np.maximum(true, 1e-9))),
        "ratio_of_means": float(np.mean(probe) / np.mean(true)),
    }


def summary(result: dict[str, Any], densities: Sequence[float]) -> dict[str, float | None]:
    """The numbers that there are targets for; None where one is not known, or not yet."""
    plan, probe = result.get("plan"), result.get("probe")

    def psnr(density: float) -> float | None:
        found = [
            row["psnr"]
            for row in result.get("variants", [])
            if row["wanted_density"] == density and row["variant"] in (ALL, BY_VIDEO)
        ]
        return max(found, default=None)

    return {
        "error on unseen samples / target": plan and plan["unseen_error"] / plan["target_error"],
        "density at equal error, calibrated / uniform": result.get("density_ratio"),
        "PSNR at the first density, dB": psnr(densities[0]),
        "PSNR at the second density, dB": psnr(densities[-1]),
        "calibration, s": plan and plan["seconds"],
        "probe error, rank correlation over calls": probe and probe["rank_correlation"],
        "probe error / true error": probe and probe["mean_ratio"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything; writes calibration.json and calibration.png, or by another name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    for name in ("frames", "height", "width", "steps"):
        parser.add_argument(f"--{name}", type=int, help="of the video (default: the demo's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--samples", type=int, default=32, help="inputs to calibrate on")
    parser.add_argument("--seeds", type=int, default=2, help="videos sampled for each variant")
    parser.add_argument("--target-error", type=float, default=0.03)
    parser.add_argument(
        "--densities", type=float, nargs="+", help="default: 0.1 0.05, on a CPU 0.4 0.25"
    )
    parser.add_argument(
        "--targets-only", action="store_true", help="only the variants that targets are about"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="after so many no other ablation is begun (default: no limit)",
    )
    parser.add_argument("--random-weights", action="store_true", help="to try the benchmark out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--name", default="calibration", help="of the files (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    names = "frames height width steps dtype samples target_error random_weights"
    settings = default_settings(given.device, **{n: getattr(given, n) for n in names.split()})
    on_gpu = torch.device(settings.device).type == "cuda"
    densities = given.densities or ((0.1, 0.05) if on_gpu else (0.4, 0.25))
    results = Results(given.out, densities, given.name)
    with open_progress(not given.quiet) as bars:
        until = 0.0 if given.targets_only else given.seconds
        measure(settings, densities, given.seeds, results, bars, until=until)
    result = results.found
    path = results.add()
    draw(result, path.with_suffix(".png"))
    print(json.dumps(result["probe"]))
    for name, value in result["summary"].items():
        shown = "unknown" if value is None else f"{value:.3f}"
        print(f"{name}: {shown} (wanted: {TARGETS[name]})")
    print(f"wrote {path} and {path.with_suffix('.png').name} in {result['seconds']:.0f} s")


def measure(
    settings: Settings,
    densities: Sequence[float],
    seeds: int,
    results: Results,
    bars: Progress,
    *,
    until: float,
) -> None:
    """All numbers of the benchmark, into `results` as they are found.

    until: seconds after which no other budgets without one ingredient are tried.
    """
    model = load_model(settings)
    results.add(
        environment=environment(),
        settings={
            **{name: getattr(settings, name) for name in SETTINGS},
            "seeds": seeds,
            "unseen": UNSEEN,
        },
    )
    wanted = [(settings.samples, CALIBRATION_SEED), (UNSEEN, UNSEEN_SEED)]
    inputs, unseen_inputs = sampled_inputs(model, settings, wanted, bars)
    samples, begun = collect_samples(model, inputs), time.perf_counter()
    with opened(model, samples, None, 0) as runner:
        calibration = Calibration(Workbench(runner, bars, Checkpoint(None, "")), orders=ORDERS)
        plan = calibration.for_error(settings.target_error)
        seconds = time.perf_counter() - begun
        unseen = collect_samples(model, unseen_inputs)
        every = [*unseen.fit, *unseen.held_out]
        unseen = replace(samples, fit=every, held_out=every)
        bench = make_bench(runner, settings, unseen, seeds, bars)
        bench.cost = calibration.bench.cost
        results.add(plan=judge(bench, plan, seconds))
        print(
            f"calibrated in {seconds:.0f} s; error on unseen samples "
            f"{results.found['plan']['unseen_error']:.4f}, target {plan.target_error:g}",
            flush=True,
        )
        compare_variants(bench, calibration, plan, densities, results, until=until)


def compare_variants(
    bench: Bench,
    calibration: Calibration,
    plan: Plan,
    densities: Sequence[float],
    results: Results,
    *,
    until: float,
) -> None:
    """Thresholds from all ingredients, from one, and from all but one, at equal densities."""
    at = [densities[0], 0.7 * min(densities)]
    first, second, third, *others = make_variants(bench, calibration, at)
    rows: list[dict[str, Any]] = []
    predicted = {density: density for density in densities}

    def run(variant: Variant) -> None:
        for density in densities:
            row, predicted[density] = compare(bench, variant, density, predicted[density])
            rows.append(row)
            results.add(variants=rows)

    for variant in (first, second):
        run(variant)
    low = min(densities)
    curves = {
        variant.name: curve(bench, variant, [min(factor * low, 0.9) for factor in factors])
        for variant, factors in ((first, CURVE), (second, (*CURVE, BEYOND)))
    }
    ratio = density_ratio(curves[ALL], curves[UNIFORM])
    results.add(curves=curves, density_ratio=ratio)
    print(f"density at equal error, calibrated / uniform: {ratio}", flush=True)
    run(third)
    path = results.add(probe=probe_agreement(bench, plan))
    draw(results.found, path.with_suffix(".png"))
    for variant in others:
        if time.perf_counter() - results.started < until:
            run(variant)
    if time.perf_counter() - results.started < until:
        run(variant_without_probes(calibration))


def judge(bench: Bench, plan: Plan, seconds: float) -> dict[str, Any]:
    """What a plan does on inputs that it was not calibrated on."""
    request = Split(
        {
            name: SiteThresholds(plan.budgets(name)[:, 0], tuple(site.chunks))
            for name, site in plan.sites.items()
            if site.decision == "split"
        }
    )
    error, density = bench.error(request)
    return {
        "target_error": plan.target_error,
        "measured_error": plan.measured_error,
        "unseen_error": error,
        "mean_density": plan.mean_density,
        "unseen_density": density,
        "psnrs": [bench.video(request, seed).psnr for seed in bench.videos],
        "seconds": seconds,
        "timestep_edges": plan.timestep_edges,
        "times_ms": {n: e.times_ms for n, e in plan.evidence.sites.items() if e.times_ms},
        "timings": [timing.model_dump() for timing in plan.evidence.timings],
    }


if __name__ == "__main__":
    main()
