"""Surveying: runs of the model on the fitted samples, in which all of its sites are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.checkpoint import Entry
from freqopt.calibration.estimate import runs_of
from freqopt.calibration.measure.ladder import EVERY_RUNG, GRID_ALONE, rungs_of
from freqopt.calibration.measure.readings import MeasuredSite, Survey, pack, unpack
from freqopt.calibration.measure.requests import Measure
from freqopt.calibration.measure.tiles import SAMPLED_TILES
from freqopt.calibration.search.probing import PROBE_DENSITY, nearest
from freqopt.calibration.search.workbench import Workbench
from freqopt.config import DEFAULT_PROBES
from freqopt.errors import CalibrationError
from freqopt.plan.records import SiteTiming
from freqopt.progress import Step

WELL_KNOWN = 0.1
"""Relative standard error of a site's squared error that is small enough: 5 % of the error."""

MOST_TILES = 8 * SAMPLED_TILES


def measure_sites(
    bench: Workbench,
    probes: int = DEFAULT_PROBES,
    orders: Sequence[int] = GRID_ALONE,
    *,
    launches: bool = False,
) -> None:
    """Measure all sites in runs on the fitted samples, those that the checkpoint has excepted.

    orders: the first of ORDERS. launches: see `time_call`.

    Raises:
        CalibrationError: samples that the model cannot serve, or nothing that can be split.
    """
    fit, survey = bench.samples.fit, bench.survey
    sites = 0
    with bench.progress.phase("measuring sites", None) as step:
        for index, sample in enumerate(fit):
            key = f"measure/{index}"
            before = bench.checkpoint.find(key)
            request = Measure(
                skipped=survey.failures(),
                timed=survey.timings,
                probes=probes,
                number=index,
                tiles=tiles_wanted(survey, index, len(fit) - index),
                orders=orders,
                rungs=rungs_of(index, len(fit)) if bench.runner.on_gpu else EVERY_RUNG,
                launches=launches,
                on_site=step,
            )
            entry = before or bench.checkpoint.keep(key, *_measure_one(bench, index, request))
            _take_in(survey, entry, bench.samples.bucket(sample))
            sites = sites or len(survey.measurable())
            step.total(sites * len(fit))
            if index == 0:
                _tell_runs(bench, step, orders)
            if before is not None:
                step(sites)
    if not survey.measurable():
        raise CalibrationError(_nothing_measured(survey))


def _tell_runs(bench: Workbench, step: Step, orders: Sequence[int]) -> None:
    """Say what the calibration takes, as its sites are known."""
    found, samples = bench.survey.measurable(), bench.samples
    if not found:
        return
    runs = runs_of(
        fitted=len(samples.fit),
        held_out=len(samples.held_out),
        sites=len(found),
        heads=sum(site.heads for site in found.values()),
        content=len(orders) > 1,
        rounds=bench.rounds,
        passes=bench.passes,
        on_gpu=bench.runner.on_gpu,
    )
    step.runs(runs.measuring / (len(found) * len(samples.fit)))
    step.expect(runs.total)


def _measure_one(bench: Workbench, index: int, request: Measure) -> tuple[Any, dict[str, Tensor]]:
    """One measuring run, as the facts and tensors that `_take_in` takes."""
    sample = bench.samples.fit[index]
    result = bench.runner.run(sample, request)
    if not all(bool(torch.isfinite(x).all()) for x in result.output):
        raise CalibrationError(
            f"sample {index} (of those fitted): the dense model's own output has NaN "
            "or infinite values; calibration needs samples that the model can serve"
        )
    if not any(bool(x.any()) for x in result.output):
        raise CalibrationError(
            f"sample {index} (of those fitted): the dense model's output is zero "
            "everywhere, so no relative error exists; are its weights loaded?"
        )
    bench.reference(sample).know(result.output)
    readings, tensors = pack(result.readings)
    facts = {
        "readings": readings,
        "shapes": result.shapes,
        "failures": result.failures,
        "dense": bench.runner.dense_sites,
        "layouts": bench.runner.layouts,
        "timings": [timing.model_dump() for timing in result.timings.values()],
    }
    return facts, tensors


def _take_in(survey: Survey, entry: Entry, bucket: int) -> None:
    """Take in a measuring run, of this calibration or of one before it."""
    facts = entry.facts
    survey.add_sites(facts["shapes"], facts["failures"])
    survey.dense_sites.update(facts["dense"])
    survey.layouts.take_in(facts.get("layouts", {}))
    for timing in facts["timings"]:
        survey.add_timing(SiteTiming.model_validate(timing, strict=False))
    survey.add_readings(unpack(facts["readings"], dict(entry.tensors)), bucket)


def tiles_wanted(survey: Survey, done: int, left: int) -> dict[str, int]:
    """Query tiles to measure in the next run, where SAMPLED_TILES in each do not tell enough.

    done, left: runs so far, and those to come, the next among them; a site is taken to be called as
    often in each.
    """
    known = {
        name: (site.total().calls, relative_deviation(site))
        for name, site in survey.measurable().items()
        if site.buckets
    }
    wanted = {
        name: _tiles_of(calls, left * calls / done, deviation)
        for name, (calls, deviation) in known.items()
        if deviation > WELL_KNOWN
    }
    return {name: tiles for name, tiles in wanted.items() if tiles > SAMPLED_TILES}


def _tiles_of(calls: int, left: float, deviation: float) -> int:
    """Tiles of each call to come with which the mean over all calls is known to WELL_KNOWN.

    Calls count alike, so what those so far leave unknown stays: with relative variances v of each,
    of SAMPLED_TILES tiles, (calls v + left v SAMPLED_TILES / tiles) / (calls + left)^2 is to be
    WELL_KNOWN^2.
    """
    together = (calls * deviation) ** 2
    allowed = (WELL_KNOWN * (calls + left)) ** 2 - together
    if allowed <= 0.0:
        return MOST_TILES
    return min(math.ceil(SAMPLED_TILES * left * together / calls / allowed), MOST_TILES)


def relative_deviation(site: MeasuredSite) -> float:
    """Standard error of a site's squared error over it, at the rung of about PROBE_DENSITY."""
    sums = site.total()
    rung = nearest(sums.mean("density").mean(1).numpy(), PROBE_DENSITY)
    error = float(sums.mean("site")[rung].sum())
    return float(sums.deviation()[rung].square().sum().sqrt()) / max(error, 1e-30)


def _nothing_measured(survey: Survey) -> str:
    reasons = {**survey.dense_sites, **survey.failures()}
    if not reasons:
        return (
            "no attention was found in the model's graph: it may be of a form that is not "
            "recognised, or the compiler may have left its frame; "
            "freqopt.inspect(model, ...) tells which"
        )
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    return f"none of the {len(reasons)} attention sites can be split ({listed})"
