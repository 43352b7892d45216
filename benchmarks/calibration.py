"""What calibration buys, and which part of it: `python -m benchmarks.calibration`.

Budgets from every ingredient of calibration, from all but one, and one threshold for everything,
at equal densities: error of the model's output on unseen inputs, and PSNR of the sampled video
against the densely sampled one, same seed, every step split. Also whether the target holds on
unseen inputs, how long calibration takes, and how well the op's probes know their call's error.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import freqopt
from benchmarks.common import RESULTS, environment, write
from freqopt.calibration import Calibration, site_choices
from freqopt.calibration_allocation import Array, ProductCost, SiteChoices, allocate
from freqopt.calibration_journal import Journal
from freqopt.calibration_measure import THRESHOLDS
from freqopt.calibration_progress import Progress, open_progress
from freqopt.calibration_run import Runner, opened, relative_error
from freqopt.calibration_samples import Sample, SampleSet, collect_samples
from freqopt.calibration_search import budgets, mean_densities
from freqopt.calibration_video import GeneratedVideo, weigh_timesteps
from freqopt.demo_settings import DTYPES, Settings, default_settings, load_model
from freqopt.demo_video import decibels, psnr
from freqopt.models_zoo.procedural import render_videos
from freqopt.models_zoo.sampling import denoising_samples, sample
from freqopt.plan import Plan

Budgets = dict[str, Tensor]
"""{site: (buckets, 2, H)}; a site without one stays dense."""

CALIBRATION_SEED, UNSEEN_SEED, VIDEO_SEED = 1000, 5000, 7
UNSEEN = 8
CONTENT_TIMES = (0.85, 0.6, 0.35, 0.1)
"""Timesteps at which videos of different content are compared."""

TOLERANCE = 0.98
"""A density between this share of the wanted one and the wanted one counts as equal."""

MATCHES = 8
CURVE = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Factors of the lowest density wanted, at which errors of calibrated and uniform are compared."""

TARGETS = {
    "error on unseen samples / target": "at most 1.1 (aim: 0.8 to 1.0)",
    "density at equal error, calibrated / uniform": "at most 0.75 (aim: 0.5)",
    "PSNR at the first density, dB": "36 at 10 % (aim: 42)",
    "PSNR at the second density, dB": "31 at 5 % (aim: 36)",
    "calibration, s": "at most 120 on an H200 (aim: 30)",
    "probe error, rank correlation over calls": "at least 0.9 (aim: 0.97)",
    "probe error / true error": "0.9 to 1.1",
}


@dataclass
class Bench:
    """What all measurements share. unseen: samples that calibration never saw."""

    model: nn.Module
    settings: Settings
    runner: Runner
    unseen: SampleSet
    references: list[list[Tensor]]
    videos: dict[int, Tensor]

    def error(self, chosen: Budgets) -> tuple[float, float]:
        """Root mean square error of the model's output over the unseen samples, and the density."""
        session = self.runner.session
        session.budgets, session.densities = chosen, {}
        errors = [
            relative_error(self.runner.run(s, "split"), reference)
            for s, reference in zip(self.unseen.fit, self.references, strict=True)
        ]
        return math.sqrt(float(np.mean(np.square(errors)))), self.density()

    def video(self, chosen: Budgets, seed: int) -> tuple[float, float]:
        """PSNR of the video of a seed against its dense twin, and the density over its steps."""
        session = self.runner.session
        session.budgets, session.densities = chosen, {}
        video = self.runner.generate(self.pipeline(seed), "split")
        return psnr(video, self.videos[seed]), self.density()

    def pipeline(self, seed: int) -> Callable[[], Tensor]:
        """Sampling of a video."""
        s = self.settings
        return partial(
            sample, self.model, frames=s.frames, height=s.height, width=s.width, steps=s.steps,
            seed=seed, device=s.device, dtype=DTYPES[s.dtype],
        )  # fmt: skip

    def density(self) -> float:
        """Of the runs since densities were cleared, over all attentions; dense ones count as 1."""
        found = mean_densities(self.runner.session.densities)
        sites = self.runner.session.sites
        return sum(float(found[n].mean()) if n in found else 1.0 for n in sites) / len(sites)


@dataclass(frozen=True)
class Variant:
    """A way to choose budgets: from a predicted mean density to them. probes: of the op's calls."""

    name: str
    budgets_at: Callable[[float], Budgets]
    probes: int = freqopt.config.DEFAULT_PROBES


def allocated(sites: Sequence[SiteChoices], density: float) -> Budgets:
    """The allocation with a predicted density, by bisection of the multiplier."""
    cost = ProductCost()
    low, high = 0.0, 80.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if allocate(sites, math.exp(middle), cost).density > density:
            high = middle
        else:
            low = middle
    return budgets(sites, allocate(sites, math.exp(low), cost))


def uniform(sites: Sequence[SiteChoices], density: float) -> Budgets:
    """One threshold for every head, site and timestep, without the mid band."""
    plain = np.flatnonzero(~sites[0].mid)[1:]
    thresholds = sites[0].threshold[plain]
    means = np.mean(
        [(s.weight[:, None] * s.density[:, plain]).sum(0) / s.heads for s in sites], axis=0
    )
    at = np.interp(-math.log(density), -np.log(means), np.log(thresholds))
    return {s.name: torch.full((len(s.shares), 2, s.heads), math.exp(at)) for s in sites}


def tied(site: SiteChoices, group: Array) -> SiteChoices:
    """The same site where rows of one group must make the same choice. group: (R,) labels."""
    density, error, damage = site.density.copy(), site.error.copy(), site.damage.copy()
    for label in np.unique(group):
        rows = group == label
        share = site.weight[rows] / site.weight[rows].sum()
        density[rows] = share @ site.density[rows]
        error[rows] = np.outer(share, site.error[rows].sum(0))
        damage[rows] = np.outer(share, site.damage[rows].sum(0))
    return replace(site, density=density, error=error, damage=damage)


def heads_tied(site: SiteChoices) -> SiteChoices:
    """One choice for all heads of a site."""
    return tied(site, np.repeat(np.arange(len(site.shares)), site.heads))


def timesteps_tied(site: SiteChoices) -> SiteChoices:
    """One choice for all timesteps of a head."""
    return tied(site, np.tile(np.arange(site.heads), len(site.shares)))


def without_mid_band(site: SiteChoices) -> SiteChoices:
    """The same site without the choices that use the mid band."""
    keep = ~site.mid
    return replace(
        site, threshold=site.threshold[keep], mid=site.mid[keep], density=site.density[:, keep],
        error=site.error[:, keep], damage=site.damage[:, keep],
    )  # fmt: skip


def without_bias_weight(site: SiteChoices) -> SiteChoices:
    """The same site where a bias counts no more than noise."""
    return replace(site, damage=site.error)


def make_variants(bench: Bench, calibration: Calibration, bars: Progress) -> list[Variant]:
    """All ways to choose budgets, the complete one first."""
    runner = calibration.runner
    sites = calibration.choices()
    counts = runner.samples.bucket_samples
    measured = runner.session.measurable()
    level = {name: np.ones_like(gains) for name, gains in calibration.gains.items()}
    unweighted = [site_choices(site, level[name], counts) for name, site in measured.items()]
    seed = next(iter(bench.videos))
    video = GeneratedVideo(bench.runner, bench.pipeline(seed), 20.0, Journal(None, ""))
    without = {
        "without budgets per head": [heads_tied(site) for site in sites],
        "without budgets per timestep": [timesteps_tied(site) for site in sites],
        "without downstream gains": unweighted,
        "without mid band": [without_mid_band(site) for site in sites],
        "without bias weight": [without_bias_weight(site) for site in sites],
        "timesteps weighed by the video": weigh_timesteps(video, sites, bars),
    }
    found = [Variant("calibrated", partial(allocated, sites))]
    found += [Variant(name, partial(allocated, chosen)) for name, chosen in without.items()]
    found.append(Variant("one threshold for all", partial(uniform, sites)))
    with opened(bench.model, runner.samples, None, 0) as bare:
        bare.session.probes = 0
        bare_calibration = Calibration(bare, bars, Journal(None, ""))
        bare_sites = bare_calibration.choices()
    found.append(Variant("without probes", partial(allocated, bare_sites), probes=0))
    return found


def at_density(bench: Bench, variant: Variant, density: float, seed: int) -> Budgets:
    """Budgets whose density, over the steps of a video, is at most the wanted one and near it."""
    predicted, best, reached = density, variant.budgets_at(density), 0.0
    for _ in range(MATCHES):
        chosen = variant.budgets_at(predicted)
        _, found = bench.video(chosen, seed)
        if reached < found <= density:
            best, reached = chosen, found
        if TOLERANCE * density <= found <= density:
            break
        predicted = min(predicted * 0.99 * density / found, 1.0)
    return best


def compare(
    bench: Bench, variants: Sequence[Variant], densities: Sequence[float], bars: Progress
) -> list[dict[str, Any]]:
    """A row for each variant and density."""
    rows = []
    with bars.phase("variants", len(variants) * len(densities)) as step:
        for density in densities:
            for variant in variants:
                bench.runner.session.probes = variant.probes
                chosen = at_density(bench, variant, density, next(iter(bench.videos)))
                videos = [bench.video(chosen, seed) for seed in bench.videos]
                error, _ = bench.error(chosen)
                mse = float(np.mean([10 ** (-found / 10) for found, _ in videos]))
                rows.append(
                    {
                        "variant": variant.name,
                        "wanted_density": density,
                        "density": float(np.mean([d for _, d in videos])),
                        "error": error,
                        "psnr": decibels(4.0 * mse),
                        "psnrs": [found for found, _ in videos],
                    }
                )
                step()
    bench.runner.session.probes = freqopt.config.DEFAULT_PROBES
    return rows


def curve(bench: Bench, variant: Variant, densities: Sequence[float]) -> list[tuple[float, float]]:
    """(density, error) on the unseen samples."""
    points = []
    for density in densities:
        error, found = bench.error(variant.budgets_at(density))
        points.append((found, error))
    return sorted(points)


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
    session = bench.runner.session
    for unseen in bench.unseen.fit:
        session.readings = []
        bench.runner.run(unseen, "measure")
        bucket = bench.unseen.bucket(unseen)
        for reading in session.readings:
            site = plan.sites[reading.site]
            if site.decision == "dense":
                continue
            budget = site.budgets[bucket]
            for head, (threshold, mid) in enumerate(zip(budget.threshold, budget.mid, strict=True)):
                rung = int(np.abs(np.log(THRESHOLDS) - math.log(max(threshold, 1e-9))).argmin())
                true.append(math.sqrt(float(reading.curves["own"][int(mid), rung, head])))
                probe.append(math.sqrt(float(reading.curves["probe"][int(mid), rung, head])))
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (true, probe)])
    return {
        "calls": len(true),
        "rank_correlation": float(np.asarray(np.corrcoef(ranks))[0, 1]),
        "mean_ratio": float(np.mean(np.array(probe) / np.maximum(true, 1e-9))),
        "ratio_of_means": float(np.mean(probe) / np.mean(true)),
    }


def clips(settings: Settings) -> dict[str, Tensor]:
    """Videos (1, 3, T, H, W) of one still frame, of motion, and of cuts between four scenes."""
    size = (settings.frames, settings.height, settings.width)
    moving = [render_videos(1, *size, seed=seed, device=settings.device) for seed in range(4)]
    cuts = [x.chunk(4, 2)[i] for i, x in enumerate(moving)]
    still = moving[0][:, :, :1].expand_as(moving[0])
    return {"still": still, "moving": moving[0], "cuts": torch.cat(cuts, 2)}


def by_content(bench: Bench, chosen: Budgets) -> list[dict[str, Any]]:
    """Error of the output and density, at one set of budgets, for calm and for busy videos."""
    dtype, runner, rows = DTYPES[bench.settings.dtype], bench.runner, []
    for name, clip in clips(bench.settings).items():
        squares, densities = [], []
        for number, time_ in enumerate(CONTENT_TIMES):
            noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(number))
            state = (1 - time_) * clip + time_ * noise.to(clip.device)
            times = torch.full((1,), time_, device=clip.device)
            call = Sample((), {"video": state.to(dtype), "timestep": times}, time_)
            reference = runner.run(call, "dense")
            runner.session.budgets, runner.session.densities = chosen, {}
            squares.append(relative_error(runner.run(call, "split"), reference) ** 2)
            densities.append(bench.density())
        error, density = math.sqrt(float(np.mean(squares))), float(np.mean(densities))
        rows.append({"content": name, "error": error, "density": density})
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """The comparison as a picture: PSNR by variant, and error against density."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from freqopt.reporting_figures import BLUE, GREY, ORANGE, STYLE, percent_axis

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        densities = sorted({row["wanted_density"] for row in result["variants"]}, reverse=True)
        names = list(dict.fromkeys(row["variant"] for row in result["variants"]))
        height = 0.8 / len(densities)
        for index, (density, colour) in enumerate(zip(densities, (BLUE, "#9cc3e4"), strict=False)):
            values = [
                next(
                    row["psnr"]
                    for row in result["variants"]
                    if (row["variant"], row["wanted_density"]) == (name, density)
                )
                for name in names
            ]
            at = np.arange(len(names)) + (index - 0.5 * (len(densities) - 1)) * height
            bars = left.barh(
                at, values, height, color=colour, label=f"PSNR at density {density:.0%}"
            )
            left.bar_label(bars, fmt="%.1f", padding=3, fontsize=8.5)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        low = min(row["psnr"] for row in result["variants"])
        left.set(xlabel="PSNR of the sampled video against dense (dB)", title="Ingredients")
        left.set_xlim(left=max(0.0, low - 6))
        figure.legend(loc="outside lower left", ncols=len(densities))
        for name, colour in (("uniform", GREY), ("calibrated", BLUE)):
            density, error = np.array(result["curves"][name]).T
            label = {"uniform": "one threshold for all", "calibrated": "calibrated"}[name]
            right.plot(density, error, "o-", color=colour, label=label)
        plan = result["plan"]
        right.axhline(plan["target_error"], color=ORANGE, lw=1.2, ls=(0, (4, 3)))
        right.scatter(
            [plan["unseen_density"]], [plan["unseen_error"]], s=90, color=ORANGE, zorder=3,
            label="plan of freqopt.calibrate",
        )  # fmt: skip
        right.set(
            xscale="log", yscale="log", xlabel="mean density", title="On unseen inputs",
            ylabel="relative L2 error of the output",
        )  # fmt: skip
        percent_axis(right)
        right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
        right.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
        right.tick_params(axis="y", which="minor", labelsize=8)
        right.legend(loc="upper right")
        figure.savefig(path, dpi=150)


def summary(result: dict[str, Any], densities: Sequence[float]) -> dict[str, Any]:
    """The issue's numbers by name."""
    best = {
        density: max(
            row["psnr"]
            for row in result["variants"]
            if row["wanted_density"] == density
            and row["variant"] in ("calibrated", "timesteps weighed by the video")
        )
        for density in densities
    }
    return {
        "error on unseen samples / target": (
            result["plan"]["unseen_error"] / result["plan"]["target_error"]
        ),
        "density at equal error, calibrated / uniform": result["density_ratio"],
        "PSNR at the first density, dB": best[densities[0]],
        "PSNR at the second density, dB": best[densities[-1]],
        "calibration, s": result["plan"]["seconds"],
        "probe error, rank correlation over calls": result["probe"]["rank_correlation"],
        "probe error / true error": result["probe"]["mean_ratio"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything; writes calibration.json and calibration.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    for name in ("frames", "height", "width", "steps"):
        parser.add_argument(f"--{name}", type=int, help="of the video (default: the demo's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--samples", type=int, default=16, help="inputs to calibrate on")
    parser.add_argument("--seeds", type=int, default=2, help="videos sampled for each variant")
    parser.add_argument("--target-error", type=float, default=0.03)
    parser.add_argument(
        "--densities", type=float, nargs="+", help="default: 0.1 0.05, on a CPU 0.4 0.25"
    )
    parser.add_argument("--random-weights", action="store_true", help="to try the benchmark out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args(arguments)
    settings = default_settings(
        given.device, frames=given.frames, height=given.height, width=given.width,
        steps=given.steps, dtype=given.dtype, samples=given.samples,
        target_error=given.target_error, random_weights=given.random_weights,
    )  # fmt: skip
    on_gpu = torch.device(settings.device).type == "cuda"
    densities = given.densities or ((0.1, 0.05) if on_gpu else (0.4, 0.25))
    started = time.perf_counter()
    with open_progress(not given.quiet) as bars:
        result = measure(settings, densities, given.seeds, bars)
    result["seconds"] = time.perf_counter() - started
    result["summary"] = summary(result, densities)
    path = write("calibration", result, given.out)
    draw(result, path.with_suffix(".png"))
    for row in result["variants"]:
        print(
            f"density {row['density']:6.1%}  error {row['error']:.4f}  PSNR {row['psnr']:5.1f} dB"
            f"  {row['variant']}"
        )
    for row in result["content"]:
        print(f"{row['content']}: error {row['error']:.4f} at density {row['density']:.1%}")
    print(json.dumps(result["probe"]))
    for name, value in result["summary"].items():
        shown = "unknown" if value is None else f"{value:.3f}"
        print(f"{name}: {shown} (wanted: {TARGETS[name]})")
    print(f"wrote {path} and {path.with_suffix('.png').name} in {result['seconds']:.0f} s")


def measure(
    settings: Settings, densities: Sequence[float], seeds: int, bars: Progress
) -> dict[str, Any]:
    """All numbers of the benchmark."""
    model = load_model(settings)
    size = {"frames": settings.frames, "height": settings.height, "width": settings.width}
    where: dict[str, Any] = {"device": settings.device, "dtype": DTYPES[settings.dtype]}
    options: dict[str, Any] = {"steps": settings.steps, **size, **where}
    with bars.phase("inputs", 4 * settings.steps) as step:
        inputs, unseen_inputs = (
            denoising_samples(
                model, count, seed=seed, callback=lambda done, total: step(), **options
            )
            for count, seed in ((settings.samples, CALIBRATION_SEED), (UNSEEN, UNSEEN_SEED))
        )
    begun = time.perf_counter()
    plan = freqopt.calibrate(model, inputs, target_error=settings.target_error, progress=False)
    seconds = time.perf_counter() - begun
    samples = collect_samples(model, inputs)
    unseen = collect_samples(model, unseen_inputs)
    every = [*unseen.fit, *unseen.held_out]
    unseen = replace(samples, fit=every, held_out=every)
    with opened(model, unseen, None, 0) as runner:
        references = [runner.run(s, "dense") for s in every]
        bench = Bench(model, settings, runner, unseen, references, {})
        with bars.phase("dense videos", seeds) as step:
            for seed in range(VIDEO_SEED, VIDEO_SEED + seeds):
                bench.videos[seed] = runner.generate(bench.pipeline(seed), "dense")
                step()
        budget_of_plan = {
            name: plan.budgets(name) for name, s in plan.sites.items() if s.decision == "split"
        }
        error, density = bench.error(budget_of_plan)
        decibels_of_plan = [bench.video(budget_of_plan, seed) for seed in bench.videos]
        probe = probe_agreement(bench, plan)
        content = by_content(bench, budget_of_plan)
        with opened(model, samples, None, 0) as fitting:
            calibration = Calibration(fitting, bars, Journal(None, ""))
            variants = make_variants(bench, calibration, bars)
        rows = compare(bench, variants, densities, bars)
        wanted = sorted(factor * densities[-1] for factor in CURVE)
        by_name = {variant.name: variant for variant in variants}
        curves = {
            "calibrated": curve(bench, by_name["calibrated"], wanted),
            "uniform": curve(bench, by_name["one threshold for all"], wanted),
        }
    return {
        "environment": environment(),
        "settings": {**size, "steps": settings.steps, "dtype": settings.dtype,
                     "samples": settings.samples, "seeds": seeds, "unseen": UNSEEN},
        "plan": {
            "target_error": plan.target_error, "measured_error": plan.measured_error,
            "unseen_error": error, "mean_density": plan.mean_density, "unseen_density": density,
            "psnrs": [found for found, _ in decibels_of_plan], "seconds": seconds,
            "timestep_edges": plan.timestep_edges,
        },
        "probe": probe,
        "content": content,
        "variants": rows,
        "curves": curves,
        "density_ratio": density_ratio(curves["calibrated"], curves["uniform"]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
