"""Train the zoo's video DiT on procedural video: `python -m freqopt.models_zoo.train --out DIR`.

The wall clock is the budget: three stages of growing resolution, each a share of the given minutes,
so that one command ends on time on any device. Checkpoints let an interrupted run go on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqopt.models_zoo.procedural import render_videos
from freqopt.models_zoo.sampling import sample
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig, save_weights

EMA_DECAY = 0.998
WARMUP_STEPS = 200
LOG_EVERY = 20
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Stage:
    """One resolution: share of the time, clip size in frames and pixels, batch size.

    shift: how far timesteps lean towards noise, more for longer clips.
    """

    share: float
    frames: int
    height: int
    width: int
    batch: int
    shift: float


GPU_STAGES = (
    Stage(0.40, 8, 60, 104, 16, 1.5),
    Stage(0.25, 13, 88, 152, 4, 2.0),
    Stage(0.35, 21, 120, 208, 1, 3.0),
)
CPU_STAGES = (
    Stage(0.75, 4, 24, 40, 6, 1.5),
    Stage(0.25, 5, 48, 80, 2, 2.0),
)
SMOKE_STAGES = (Stage(0.5, 2, 8, 12, 2, 1.0), Stage(0.5, 3, 12, 16, 1, 1.0))


class State:
    """Everything a checkpoint holds: model, its moving average, optimiser, progress."""

    def __init__(
        self, config: VideoDiTConfig, device: torch.device, seed: int, rate: float
    ) -> None:
        torch.manual_seed(seed)
        self.model = VideoDiT(config).to(device)
        self.average = VideoDiT(config).to(device)
        self.average.load_state_dict(self.model.state_dict())
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda",
        )  # fmt: skip
        self.step = 0
        self.seconds = 0.0
        self.log: list[tuple[int, int, float, float]] = []

    def save(self, path: Path) -> None:
        """Write a checkpoint; readers never see half of one."""
        parts = {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(), "step": self.step,
            "seconds": self.seconds, "log": self.log,
        }  # fmt: skip
        temporary = path.with_suffix(".part")
        torch.save(parts, temporary)
        temporary.replace(path)

    def load(self, path: Path, device: torch.device) -> None:
        """Go on from a checkpoint."""
        parts = torch.load(path, map_location=device, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        self.optimiser.load_state_dict(parts["optimiser"])
        self.step, self.seconds = parts["step"], parts["seconds"]
        self.log = [tuple(row) for row in parts["log"]]


def stage_at(stages: tuple[Stage, ...], progress: float) -> int:
    """Index of the stage in force after a share `progress` of the time."""
    edge = 0.0
    for index, stage in enumerate(stages):
        edge += stage.share
        if progress < edge:
            return index
    return len(stages) - 1


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up in steps, cosine fall to 1 % over the wall clock."""
    warm = min((step + 1) / WARMUP_STEPS, 1.0)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def flow_loss(model: nn.Module, video: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at logit-normal, shifted times (arXiv 2403.03206)."""
    batch = video.shape[0]
    normal = torch.randn(batch, device=video.device, generator=generator)
    t = torch.sigmoid(normal)
    t = stage.shift * t / (1 + (stage.shift - 1) * t)
    noise = torch.randn(video.shape, device=video.device, generator=generator)
    mixing = t[:, None, None, None, None]
    noisy = (1 - mixing) * video + mixing * noise
    target = noise - video
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        velocity: Tensor = model(noisy, t)
    return (velocity.float() - target).square().mean()


class Report:
    """Progress with time left: a bar on a terminal with rich, plain lines elsewhere."""

    def __init__(self, total_seconds: float, log_path: Path) -> None:
        self.total = total_seconds
        self.file = log_path.open("a", newline="")
        self.rows = csv.writer(self.file)
        self.bar: Any = None
        if sys.stdout.isatty():
            try:
                from rich.progress import Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            self.bar = Progress(
                *Progress.get_default_columns()[:2], TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("training", total=total_seconds, said="")

    def row(self, state: State, stage: int, loss: float, step_ms: float) -> None:
        """Note one point of the loss curve."""
        state.log.append((state.step, stage, loss, round(state.seconds, 2)))
        self.rows.writerow(state.log[-1])
        self.file.flush()
        said = f"stage {stage + 1}  step {state.step}  loss {loss:.4f}  {step_ms:.0f} ms/step"
        if self.bar is not None:
            self.bar.update(self.task, completed=state.seconds, said=said)
        elif state.step % (LOG_EVERY * 10) == 0 or step_ms > 500:
            left = max(self.total - state.seconds, 0)
            print(f"{said}  {left:.0f} s left", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.file.close()


def compile_blocks(model: VideoDiT) -> None:
    """Compile the repeated block once per stage; stay eager, and say so, where that fails."""
    for block in model.blocks:
        block.compile(dynamic=False)


def train(
    state: State,
    stages: tuple[Stage, ...],
    *,
    seconds: float,
    rate: float,
    seed: int,
    out: Path,
    device: torch.device,
    stop: Callable[[], bool],
) -> None:
    """Train until the wall clock has used `seconds`, over all runs of this folder, or `stop`."""
    generator = torch.Generator(device).manual_seed(seed + 7 + state.step)
    report = Report(seconds, out / "train_log.csv")
    started, before = time.monotonic(), state.seconds
    saved, marked, marked_step = started, started, state.step
    losses = torch.zeros((), device=device)
    try:
        while not stop():
            state.seconds = before + time.monotonic() - started
            progress = state.seconds / seconds
            if progress >= 1:
                break
            index = stage_at(stages, progress)
            stage = stages[index]
            for group in state.optimiser.param_groups:
                group["lr"] = learning_rate(rate, state.step, progress)
            with torch.no_grad():
                video = render_videos(
                    stage.batch, stage.frames, stage.height, stage.width,
                    seed=seed * 1_000_003 + state.step, device=device,
                )  # fmt: skip
            loss = flow_loss(state.model, video, stage, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
            state.optimiser.step()
            state.optimiser.zero_grad(set_to_none=True)
            decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(state.average.parameters()), list(state.model.parameters()), 1 - decay
                )
            losses += loss.detach()
            state.step += 1
            if state.step % LOG_EVERY == 0:
                value = float(losses) / LOG_EVERY
                now = time.monotonic()
                step_ms = 1000 * (now - marked) / max(state.step - marked_step, 1)
                marked, marked_step = now, state.step
                losses.zero_()
                report.row(state, index, value, step_ms)
                if not math.isfinite(value):
                    raise RuntimeError(f"loss is {value} at step {state.step}; lower --rate")
                if now - saved > CHECKPOINT_SECONDS:
                    state.save(out / "checkpoint.pt")
                    saved = now
    finally:
        report.close()
        state.save(out / "checkpoint.pt")


def contact_sheet(video: Tensor, path: Path, frames: int = 5) -> None:
    """Write evenly spaced frames of (3, T, H, W) in [-1, 1] side by side as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = min(frames, video.shape[1])
    picked = [round(i * (video.shape[1] - 1) / max(count - 1, 1)) for i in range(count)]
    row = torch.cat([video[:, i] for i in picked], -1)
    plt.imsave(path, ((row.permute(1, 2, 0) + 1) / 2).clamp(0, 1).cpu().numpy())


def write_results(
    state: State,
    stages: tuple[Stage, ...],
    out: Path,
    command: str,
    device: torch.device,
    steps: int,
) -> None:
    """Weights of the moving average, the log, and contact sheets to look at."""
    model = state.average.eval()
    save_weights(model, out / "video_dit.safetensors", trained_with=command)
    per_stage = [sum(1 for row in state.log if row[1] == i) * LOG_EVERY for i in range(len(stages))]
    thin = max(len(state.log) // 300, 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    log = {
        "command": command, "device": name or platform.machine(), "torch": torch.__version__,
        "python": platform.python_version(), "seconds": round(state.seconds, 1),
        "steps": state.step, "steps_per_stage": per_stage,
        "stages": [vars(stage) for stage in stages],
        "parameters": sum(p.numel() for p in model.parameters()),
        "columns": ["step", "stage", "loss", "seconds"], "log": state.log[::thin],
    }  # fmt: skip
    (out / "train_log.json").write_text(json.dumps(log, indent=None) + "\n")
    last = stages[-1]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    video = sample(
        model.to(dtype), frames=last.frames, height=last.height, width=last.width,
        steps=steps, seed=1, device=device, dtype=dtype,
    )  # fmt: skip
    contact_sheet(video[0], out / "sampled.png")
    real = render_videos(1, last.frames, last.height, last.width, seed=5, device=device)
    contact_sheet(real[0], out / "training_video.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m freqopt.models_zoo.train", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of weights, log, checkpoint"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock for training")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--smoke", action="store_true", help="tiny clips and model, for tests")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; use --device cpu")
    checkpoint = given.out / "checkpoint.pt"
    if given.resume and not checkpoint.exists():
        parser.error(f"--resume: there is no checkpoint at {checkpoint}")
    if checkpoint.exists() and not given.resume:
        parser.error(f"{checkpoint} exists; pass --resume to go on with it, or another --out")
    given.out.mkdir(parents=True, exist_ok=True)
    command = "python -m freqopt.models_zoo.train " + " ".join(arguments or sys.argv[1:])

    stages = GPU_STAGES if device.type == "cuda" else CPU_STAGES
    config = VideoDiTConfig()
    if given.smoke:
        stages = SMOKE_STAGES
        config = VideoDiTConfig(width=32, layers=2, mlp_width=64, rope_axes=(4, 6, 6))
    torch.set_float32_matmul_precision("high")
    state = State(config, device, given.seed, given.rate)
    if given.resume:
        state.load(checkpoint, device)
    if device.type == "cuda" and os.environ.get("FREQOPT_TRAIN_EAGER") != "1":
        compile_blocks(state.model)

    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    train(
        state, stages, seconds=given.minutes * 60, rate=given.rate, seed=given.seed,
        out=given.out, device=device, stop=lambda: bool(interrupted),
    )  # fmt: skip
    if interrupted:
        print(f"stopped at step {state.step}; go on with --resume")
        return
    write_results(state, stages, given.out, command, device, given.sample_steps)
    print(
        f"{state.step} steps in {state.seconds:.0f} s; wrote {given.out / 'video_dit.safetensors'}"
    )


if __name__ == "__main__":
    main()
