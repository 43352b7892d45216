"""What launching costs, one by one and repeated: `python -m benchmarks.launches` on a GPU.

A call of the op launches some twenty kernels. The second call of a form is recorded, and from then
on its launches are repeated (`freqopt.kernels.repeat`). Calls on the zoo model's Q, K and V, and a
compiled step of the whole model, both ways, with the error beside the time. *Launched* is the time
until Python has launched a call; *whole* that from one call to the next.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import freqopt
from benchmarks.attention import relative_errors, threshold_for
from benchmarks.common import environment, graph_milliseconds, write
from benchmarks.pages import table
from benchmarks.tensors import Attention, zoo_attention
from freqopt.calibration.measure.clock import launch_milliseconds, run_milliseconds
from freqopt.calibration.outputs import relative_error
from freqopt.kernels.repeat import REPEATER
from freqopt.models_zoo.video_dit import load_pretrained

GRID, DENSITY, STEP_THRESHOLD = (21, 30, 52), 0.1, 2.0

REPEATS, ROUNDS = 20, 3


class Case(NamedTuple):
    """A call: so many heads, in an order by content in chunks (0: by the grid)."""

    heads: int
    chunk: int


CASES = (Case(2, 0), Case(2, 512), Case(12, 0), Case(24, 0), Case(24, 1024))

WAYS = ("one by one", "repeated")


def call_row(a: Attention, case: Case) -> dict[str, Any]:
    """Times of a call both ways, and its error."""
    own = Attention(*(x[:, : case.heads] for x in a[:3]), a.grid)
    threshold = threshold_for(own, DENSITY)
    order: dict[str, Any] = {"order": "content", "chunk": case.chunk} if case.chunk else {}

    def call() -> Tensor:
        out: Tensor = freqopt.split_attention(*own[:3], grid=own.grid, threshold=threshold, **order)
        return out

    stats = freqopt.split_attention(
        *own[:3], grid=own.grid, threshold=threshold, return_stats=True, **order
    )[1]
    truth = F.scaled_dot_product_attention(*(x.float() for x in own[:3]))
    l1, l2 = relative_errors(call(), truth)
    row = {**case._asdict(), "density": float(stats.density.mean()), "l1": l1, "l2": l2}
    ways = {way: times_of(call, way) for way in WAYS}
    return {**row, "gpu_ms": graph_milliseconds(call), "ways": ways}


def times_of(run: Callable[[], object], way: str) -> dict[str, float]:
    """Milliseconds until a call is launched, and from one to the next; the best of some rounds."""
    with launching(way):
        for _ in range(3):
            run()
        launched = min(launch_milliseconds(run, REPEATS) for _ in range(ROUNDS))
        whole = min(
            run_milliseconds(lambda: [run() for _ in range(REPEATS)]) / REPEATS
            for _ in range(ROUNDS)
        )
    return {"launched_ms": launched, "whole_ms": whole}


@contextlib.contextmanager
def launching(way: str) -> Iterator[None]:
    """Calls in here are launched one by one, or as they are by default."""
    with REPEATER.plainly() if way == WAYS[0] else contextlib.nullcontext():
        yield


def step_rows(grid: tuple[int, int, int]) -> dict[str, Any]:
    """A compiled step of the zoo's model, dense and split by one threshold, both ways."""
    device = torch.device("cuda")
    model = load_pretrained(device=device, dtype=torch.bfloat16)
    t, h, w = grid
    generator = torch.Generator(device).manual_seed(0)
    channels = model.config.channels
    video = torch.randn(1, channels, t, 4 * h, 4 * w, device=device, generator=generator)
    inputs = video.bfloat16(), torch.full((1,), 0.5, device=device)
    options = {"threshold": STEP_THRESHOLD}
    dense = torch.compile(model, dynamic=False)
    split = torch.compile(model, dynamic=False, backend="freqopt", options=options)
    with torch.no_grad():
        truth = model(*inputs)
        rows: dict[str, Any] = {"dense": times_of(lambda: dense(*inputs), WAYS[1])}
        for way in WAYS:
            found = times_of(lambda: split(*inputs), way)
            with launching(way):
                error = relative_error([split(*inputs)], [truth])
            rows[way] = {**found, "l2": error}
    return rows


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Of the calls, and of the steps."""
    head = ["heads", "order", "density", "L2", "GPU alone", *WAYS, "of them launching"]
    yield from table(head, [_call(row) for row in result["calls"]])
    yield ""
    yield "A compiled step of the zoo's model, twelve attentions of two heads, one threshold:"
    yield ""
    steps = result["steps"]
    yield from table(
        ["", "a step", "of it launching", "L2"], [_step(*row) for row in steps.items()]
    )


def _step(name: str, row: dict[str, float]) -> list[str]:
    error = f"{row['l2']:.4f}" if "l2" in row else ""
    return [name, _ms(row["whole_ms"]), _ms(row["launched_ms"]), error]


def _call(row: dict[str, Any]) -> list[str]:
    ways = [row["ways"][way] for way in WAYS]
    return [
        str(row["heads"]),
        f"content {row['chunk']:,}" if row["chunk"] else "grid",
        f"{row['density']:.3f}",
        f"{row['l2']:.4f}",
        _ms(row["gpu_ms"]),
        *(_ms(way["whole_ms"]) for way in ways),
        " and ".join(_ms(way["launched_ms"]) for way in ways),
    ]


def _ms(value: float) -> str:
    return f"{value:.2f} ms"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write launches.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("it measures launches on a GPU, and there is none")
    result: dict[str, Any] = {"environment": environment(), "grid": GRID, "calls": []}
    result["steps"] = step_rows(GRID)
    write("launches", result, given.out)
    a = zoo_attention(GRID)
    for case in CASES:
        result["calls"].append(call_row(a, case))
        write("launches", result, given.out)
    print("\n".join(tables(result)))


if __name__ == "__main__":
    main()
