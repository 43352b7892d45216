"""Whether plans pay: a calibrated model against the dense one, both compiled, at several sizes.

`python -m benchmarks.paying` on a GPU. The zoo's model makes clips of sizes at which attention is
a small or a large part of its time. At each a plan is calibrated several times, on inputs of its
own seed, and the whole model is timed compiled, dense and split in turn: a plan is never to be
slower than dense, or is to split nothing and say so. Rows are written one by one; those that the
file has are kept, and each says of which commit it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import freqopt
from benchmarks import large
from benchmarks.calibration_bench import sampled_inputs
from benchmarks.common import earlier, environment, timed, write
from benchmarks.pages import table
from benchmarks.profiles import profiled
from freqopt.calibration.measure.clock import compare_runs
from freqopt.calibration.outputs import relative_error
from freqopt.demo.settings import Settings, default_settings, load_model
from freqopt.progress import open_progress

SIZES = (
    (5, 60, 104),
    (17, 60, 104),
    (9, 88, 152),
    (13, 88, 152),
    (21, 88, 152),
    (21, 120, 208),
)
"""Frames, height and width of the clips: 1,950 to 32,760 tokens. The first takes nearly all of its
time to be launched, so that nothing can pay."""

RUNS, SAMPLES, STEPS = 3, 8, 12
FIRST_SEED = 4_000


class Times(NamedTuple):
    """Least milliseconds of a compiled call, dense and split, taken in turn; attention's share."""

    dense: float
    split: float
    attention: float


def times_of(model: nn.Module, plan: freqopt.Plan, call: dict[str, Any]) -> tuple[Times, float]:
    """Times of a call both ways, and the relative error of the split one."""
    device = next(model.parameters()).device
    meter = large.Meter(device)
    torch._dynamo.reset()
    dense = torch.compile(model, dynamic=False)
    split = torch.compile(model, dynamic=False, backend="freqopt", options={"plan": plan})
    with torch.no_grad():
        truth: Tensor = model(**call)
        for run in (dense, split, split):  # compiles, and records launches
            output = run(**call)
        error = relative_error([output], [truth])
        ms = compared(lambda: dense(**call), lambda: split(**call), device)
        parts = profiled(lambda: dense(**call), device, meter.wait)
    return Times(*ms, parts.attention / parts.whole), error


def compared(
    dense: Callable[[], object], split: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Milliseconds of two runs of the whole model."""
    if device.type == "cuda":
        return compare_runs(dense, split)
    return timed(dense, device), timed(split, device)


def row_of(settings: Settings, run: int, target_error: float) -> dict[str, Any]:
    """One plan, and what it takes."""
    model = load_model(settings)
    with open_progress(False) as bars:
        calls = sampled_inputs(model, settings, [(settings.samples, FIRST_SEED + run)], bars)[0]
    begun = time.perf_counter()
    plan = freqopt.calibrate(model, calls, target_error=target_error, clock="compiled")
    seconds = time.perf_counter() - begun
    times, error = times_of(model, plan, calls[len(calls) // 2])
    return {
        "commit": environment()["commit"],
        "frames": settings.frames,
        "height": settings.height,
        "width": settings.width,
        "tokens": settings.frames * settings.height * settings.width // 16,
        "run": run,
        "calibration_s": seconds,
        "dense_ms": times.dense,
        "split_ms": times.split,
        "attention_share": times.attention,
        "error": error,
        "density": plan.mean_density,
        "split": sum(site.decision == "split" for site in plan.sites.values()),
        "sites": len(plan.sites),
        "notes": plan.evidence.notes,
    }


def rows(result: dict[str, Any]) -> Iterator[str]:
    """The table: a size in each row, its runs beside one another."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: (row["tokens"], row["run"])):
        found.setdefault(row["tokens"], []).append(row)
    head = [
        "tokens",
        "attention, of dense",
        "dense",
        "split",
        "speed-up",
        "sites split",
        "error",
        "commit",
    ]
    yield from table(
        head,
        [
            [
                f"{tokens:,}",
                f"{each[0]['attention_share']:.0%}",
                _all(f"{row['dense_ms']:.2f}" for row in each) + " ms",
                _all(f"{row['split_ms']:.2f}" for row in each) + " ms",
                _all(f"{row['dense_ms'] / row['split_ms']:.2f}x" for row in each),
                _all(f"{row['split']} of {row['sites']}" for row in each),
                _all(f"{row['error']:.4f}" for row in each),
                _all(dict.fromkeys(row.get("commit", "unknown") for row in each)),
            ]
            for tokens, each in found.items()
        ],
    )


def identity_of(row: dict[str, Any]) -> tuple[int, ...]:
    """What a row is of: frames, height, width and run."""
    return row["frames"], row["height"], row["width"], row["run"]


def _all(values: Iterable[str]) -> str:
    return ", ".join(values)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write paying.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=large.grid_of,
        default=list(SIZES),
        help="frames x height x width, such as 5x60x104",
    )
    parser.add_argument("--runs", type=int, default=RUNS, help="plans for each size")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--target-error", type=float, default=0.03)
    parser.add_argument("--random-weights", action="store_true", help="to try the benchmark out")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seconds", type=int, default=None, help="end after so many")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    result = earlier("paying", {"target_error": given.target_error}, given.out)
    there = {identity_of(row) for row in result["rows"]}
    try:
        with large.at_most(given.seconds):
            for run in range(given.runs):  # an ended run has every size
                for size in given.sizes:
                    if (*size, run) in there:
                        continue
                    frames, height, width = size
                    settings = default_settings(
                        given.device,
                        frames=frames,
                        height=height,
                        width=width,
                        steps=given.steps,
                        samples=given.samples,
                        random_weights=given.random_weights or None,
                    )
                    row = row_of(settings, run, given.target_error)
                    result["rows"].append(row)
                    write("paying", result, given.out)
                    print(row, flush=True)
    except large.TimeUp:
        print(f"stopped after {given.seconds} s; the rows until then are written")
    print("\n".join(rows(result)))


if __name__ == "__main__":
    main()
