"""A low-rank adapter trained through the split, beside dense: `python -m benchmarks.lora`.

Two adapters of the zoo's model start alike and see the same clips, times and noise, in a style that
the model has not met: one attends densely, the other through the split and its backward pass. They
take their steps in turn, so that a run that is cut off by `--seconds` has as many of both. Written
are losses and norms of gradients over the steps, the losses on held-out clips, each adapter
attending both ways, and the time of a step. `--small` fits a CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import environment, write
from benchmarks.generations import attending, split
from benchmarks.pages import RESULTS, load, origin, table
from freqopt.models_zoo.low_rank import adapt
from freqopt.models_zoo.training.loop import draw_times, flow_loss
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.models_zoo.video_dit import VideoDiT, load_pretrained

EVERY = 10
"""Steps behind one point of the curves."""

SHIFT = 2.5
"""How far times lean towards noise, as in the last stage of the model's own training."""

HELD_OUT = 2**40
"""Seeds from here on are of clips that nobody trains on."""

DIVERGED = 1.5
"""A loss whose last fifth is so many times above its lowest fifth has diverged."""

SMALL = {"steps": 20, "frames": 3, "height": 36, "width": 40, "rank": 4}
"""Settings of `--small`."""

Ways = dict[str, Callable[[], AbstractContextManager[None]]]


def styled(clips: Tensor) -> Tensor:
    """Clips (B, 3, T, H, W) in another style: two colours of ink on paper, running back at half.

    The scenes are those of the model's training; colours, contrast and motion are not.
    """
    frames = clips.shape[2]
    back = [min(2 * i, 2 * (frames - 1) - 2 * i) for i in range(frames)]
    light = (clips[:, :, back].mean(1, keepdim=True) * 2.5).tanh()
    paper, ink = (
        torch.tensor(colour, device=clips.device).view(1, 3, 1, 1, 1)
        for colour in ((0.9, 0.75, 0.4), (-0.7, -0.9, -0.1))
    )
    return torch.lerp(ink, paper, (light + 1) / 2)


@dataclass
class Learner:
    """One adapter: its model, its optimiser, how it attends, and what was seen of it."""

    model: VideoDiT
    optimiser: torch.optim.Optimizer
    way: Callable[[], AbstractContextManager[None]]
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, clips: Tensor, t: Tensor, seed: int) -> None:
        """Forward, backward and update; gradients are not clipped, so that their norms tell."""
        begun = _now(clips.device)
        generator = torch.Generator(clips.device).manual_seed(seed)
        with self.way():
            loss = flow_loss(self.model, clips, t, generator)
            loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        self.seconds.append(_now(clips.device) - begun)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def learners(model: VideoDiT, ways: Ways, rank: int, rate: float) -> dict[str, Learner]:
    """Adapters with the same first weights, one for each way to attend."""
    torch.manual_seed(0)
    adapt(model, rank)
    found = {}
    for name, way in ways.items():
        own = copy.deepcopy(model).train()
        trained = [p for p in own.parameters() if p.requires_grad]
        found[name] = Learner(own, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), way)
    return found


@torch.no_grad()
def held_out(model: nn.Module, size: tuple[int, int, int], device: torch.device) -> float:
    """Mean loss on three clips at nine times, always the same ones."""
    generator = torch.Generator(device).manual_seed(123)
    losses = []
    for index in range(9):
        clips = styled(render_videos(1, *size, seed=HELD_OUT + index % 3, device=device))
        t = torch.full((1,), 0.1 * (index + 1), device=device)
        losses.append(flow_loss(model, clips, t, generator))
    return float(torch.stack(losses).mean())


def judged(model: nn.Module, ways: Ways, size: tuple[int, int, int], device: torch.device) -> Any:
    """Held-out losses of one model by how it attends."""
    found = {}
    for name, way in ways.items():
        with way():
            found[name] = held_out(model, size, device)
    return found


def train(
    learning: dict[str, Learner],
    size: tuple[int, int, int],
    *,
    steps: int,
    batch: int,
    seconds: float,
    device: torch.device,
) -> None:
    """Steps in turn on the same clips, until there are `steps` of them or the time is over."""
    times, begun = torch.Generator(device).manual_seed(7), time.monotonic()
    for step in range(steps):
        if time.monotonic() - begun > seconds:
            print(f"stopped after {step} steps: {seconds:.0f} s are over", flush=True)
            break
        with torch.no_grad():
            clips = styled(render_videos(batch, *size, seed=1_000_003 + step, device=device))
        t = draw_times(batch, step, SHIFT, times)
        for learner in learning.values():
            learner.step(clips, t, step)
        if (step + 1) % (10 * EVERY) == 0 or step + 1 == steps:
            said = [
                f"{name} loss {float(torch.stack(each.losses[-EVERY:]).mean()):.4f}, "
                f"{1000 * statistics.median(each.seconds):.0f} ms a step"
                for name, each in learning.items()
            ]
            print(f"step {step + 1}: {'; '.join(said)}", flush=True)


def pieces(values: Sequence[float]) -> Iterator[Sequence[float]]:
    """As many steps as a point of a curve stands for, and so on; a last part is left out."""
    for start in range(0, len(values) - EVERY + 1, EVERY):
        yield values[start : start + EVERY]


def curves(learner: Learner) -> dict[str, Any]:
    """What is kept of one adapter's training: a point for every `EVERY` steps."""
    losses = torch.stack(learner.losses).tolist()
    norms = torch.stack(learner.norms).tolist()
    curve = [sum(part) / len(part) for part in pieces(losses)]
    fifth = max(len(curve) // 5, 1)
    fifths = [statistics.mean(curve[i : i + fifth]) for i in range(len(curve) - fifth + 1)]
    finite = all(map(math.isfinite, losses + norms))
    return {
        "loss": curve,
        "gradient_norm": [sum(part) / len(part) for part in pieces(norms)],
        "largest_norm": max(norms),
        "step_s": statistics.median(learner.seconds),
        "diverged": not finite or (bool(fifths) and fifths[-1] > DIVERGED * min(fifths)),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Losses and norms of gradients over the steps, and how far the losses are apart."""
    import matplotlib
    from matplotlib.figure import Figure

    from freqopt.reporting.style import BLUE, GREY, ORANGE, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.2), layout="constrained")
        axes = figure.subplots(1, 3)
        for key, at in (("loss", axes[0]), ("gradient_norm", axes[1])):
            for (name, row), colour in zip(result["trained"].items(), (GREY, BLUE), strict=True):
                points = [EVERY * (i + 1) for i in range(len(row[key]))]
                at.plot(points, row[key], color=colour, label=name, lw=1.4)
        dense, other = (row["loss"] for row in result["trained"].values())
        apart = [b / a - 1 for a, b in zip(dense, other, strict=True)]
        axes[2].plot([EVERY * (i + 1) for i in range(len(apart))], apart, color=ORANGE)
        axes[2].axhline(0, color=GREY, lw=1)
        axes[0].set(title="Loss", xlabel="step", yscale="log")
        axes[1].set(title="Norm of the gradients", xlabel="step", yscale="log")
        axes[2].set(title="Split's loss above dense", xlabel="step")
        axes[2].yaxis.set_major_formatter(lambda y, _: f"{y:+.2%}")
        axes[0].legend()
        figure.savefig(path, dpi=130)


def page() -> Iterator[str]:
    """The body of the results' page."""
    result = load("lora")
    settings, rows = result["settings"], []
    yield f"Adapters of rank {settings['rank']} on all linear layers of the zoo's model,"
    yield f"{result['steps']} steps on clips of {result['tokens']:,} tokens in a style new to it."
    yield "Both start alike and see the same clips, times and noise; gradients are not clipped."
    yield f"The split has {settings['density']:.0%} of its pairs exact, forwards and backwards."
    yield from ("", origin(result), "")
    rows.append(["none", *(f"{v:.4f}" for v in result["before"].values()), "", "", ""])
    for name, row in result["trained"].items():
        rows.append(
            [
                name,
                *(f"{v:.4f}" for v in row["held_out"].values()),
                f"{row['largest_norm']:.3g}",
                "yes" if row["diverged"] else "no",
                f"{1000 * row['step_s']:.0f} ms",
            ]
        )
    ways = [f"held-out loss, {name}" for name in result["before"]]
    yield from table(["trained", *ways, "largest norm", "diverged", "a step"], rows)
    dense, other = (row["loss"] for row in result["trained"].values())
    apart = [abs(b / a - 1) for a, b in zip(dense, other, strict=True)]
    yield ""
    yield f"The two losses are never more than {max(apart):.1%} apart, in means of {EVERY} steps."
    yield from ("", "![Loss and gradients over the steps](../../benchmarks/results/lora.png)")


def main(arguments: list[str] | None = None) -> None:
    """Train both, compare, and write lora.json and lora.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--height", type=int, default=120, help="pixels, a multiple of 4")
    parser.add_argument("--width", type=int, default=208, help="pixels, a multiple of 4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after")
    parser.add_argument("--small", action="store_true", help=f"for a CPU: {SMALL}")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    if parser.parse_known_args(arguments)[0].small:
        parser.set_defaults(**SMALL)
    given = parser.parse_args(arguments)
    device, size = torch.device(given.device), (given.frames, given.height, given.width)
    grid = (given.frames, given.height // 4, given.width // 4)

    def through() -> AbstractContextManager[None]:
        return attending(split(grid, given.density))

    ways: Ways = {"dense": nullcontext, "split": through}
    model = load_pretrained(device=device)
    before = judged(model, ways, size, device)
    learning = learners(model, ways, given.rank, given.rate)
    train(
        learning,
        size,
        steps=given.steps,
        batch=given.batch,
        seconds=given.seconds,
        device=device,
    )
    settings = {k: v for k, v in vars(given).items() if k not in ("out", "seconds", "small")}
    result = {
        "environment": environment(),
        "tokens": math.prod(grid),
        "grid": grid,
        "settings": settings,
        "steps": len(learning["dense"].losses),
        "every": EVERY,
        "before": before,
        "trained": {
            name: {**curves(each), "held_out": judged(each.model.eval(), ways, size, device)}
            for name, each in learning.items()
        },
    }
    print(f"wrote {write('lora', result, given.out)}")
    draw(result, (given.out or RESULTS) / "lora.png")


if __name__ == "__main__":
    main()
