"""Distil the zoo's model into four steps; in a checkout only.

`python -m freqopt.models_zoo.training.distil --out DIR` trains a low-rank adapter and writes it,
with a log and contact sheets of a clip by teacher and student. The student walks its four steps
from noise; from each state that it comes to, the teacher takes six small steps to where the
student's one should end, and the student's velocity is drawn to the mean of theirs (progressive
distillation, arXiv 2202.00512, with all halvings at once, on the student's own states).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from freqopt.models_zoo.distilled import ADAPTER, STEPS, fingerprint
from freqopt.models_zoo.low_rank import adapt, save_adapter
from freqopt.models_zoo.sampling import initial_noise, time_steps
from freqopt.models_zoo.training.contact_sheet import write_contact_sheet
from freqopt.models_zoo.training.loop import Stage, fastest_attention, learning_rate, stage_at
from freqopt.models_zoo.video_dit import load_pretrained

SUBSTEPS = 6
"""The teacher's steps within one of the student's: 24 in all, whose times contain the student's."""

WARMUP_STEPS, LAST_RATE = 15, 0.02
LOG_EVERY = 5

GPU_STAGES = (
    Stage(0.4, 8, 60, 104, 8, 1.0),
    Stage(0.3, 13, 88, 152, 2, 1.0),
    Stage(0.3, 21, 120, 208, 1, 1.0),
)
CPU_STAGES = (Stage(0.7, 4, 24, 40, 4, 1.0), Stage(0.3, 5, 48, 80, 1, 1.0))
SMOKE_STAGES = (Stage(0.5, 2, 8, 12, 2, 1.0), Stage(0.5, 3, 12, 16, 1, 1.0))

Velocity = Callable[[Tensor, float], Tensor]


def velocity_of(model: nn.Module) -> Velocity:
    """A model at one time for a whole batch: float32 in and out, bfloat16 inside on a GPU."""

    def velocity(state: Tensor, now: float) -> Tensor:
        t = torch.full((len(state),), now, device=state.device)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=state.is_cuda):
            out: Tensor = model(state, t)
        return out.float()

    return velocity


@torch.no_grad()
def walk(velocity: Velocity, state: Tensor, times: Sequence[float]) -> Tensor:
    """Euler steps from the first to the last of the times."""
    for now, then in itertools.pairwise(times):
        state = state + (then - now) * velocity(state, now)
    return state


def lessons(student: Velocity, teacher: Velocity, noise: Tensor) -> Iterator[Tensor]:
    """The loss of each of the student's steps, along its own way from the noise."""
    times = time_steps(STEPS * SUBSTEPS).tolist()
    state = noise
    for step in range(STEPS):
        inside = times[step * SUBSTEPS : (step + 1) * SUBSTEPS + 1]
        length = inside[-1] - inside[0]
        wanted = (walk(teacher, state, inside) - state) / length
        found = student(state, inside[0])
        yield F.mse_loss(found, wanted)
        state = (state + length * found).detach()


class Distillation:
    """A teacher, a student that begins as the teacher, and the student's training."""

    def __init__(self, teacher: nn.Module, device: torch.device, rank: int, rate: float) -> None:
        self.device, self.rate = device, rate
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        torch.manual_seed(0)
        self.parameters = adapt(self.student, rank)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.noise = torch.Generator(device).manual_seed(11)
        self.log: list[tuple[int, int, list[float], float]] = []
        self.steps = 0

    def step(self, stage: Stage, progress: float) -> list[float]:
        """One update on a batch of the stage; returns the loss of each of the student's steps."""
        shape = (stage.batch, 3, stage.frames, stage.height, stage.width)
        noise = torch.randn(shape, device=self.device, generator=self.noise)
        losses = []
        for loss in lessons(velocity_of(self.student), velocity_of(self.teacher), noise):
            (loss / STEPS).backward()
            losses.append(loss.detach())
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(
                self.rate, self.steps, progress, warm_up=WARMUP_STEPS, last=LAST_RATE
            )
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        return torch.stack(losses).tolist()

    def run(self, stages: tuple[Stage, ...], seconds: float, most: int | None = None) -> None:
        """Train for so many seconds, or `most` updates if these are sooner.

        Raises:
            RuntimeError: the loss is not finite.
        """
        begun, running, said = time.monotonic(), -1, 0.0
        while most is None or self.steps < most:
            spent = time.monotonic() - begun
            if spent >= seconds:
                break
            index = stage_at(stages, spent / seconds)
            losses = self.step(stages[index], spent / seconds)
            if not all(map(math.isfinite, losses)):
                raise RuntimeError(
                    f"loss is {losses} at update {self.steps}; lower --rate (it was {self.rate})"
                )
            if index != running or self.steps % LOG_EVERY == 0:
                self.log.append((self.steps, index, losses, round(spent, 2)))
            if index != running or spent - said > 10:
                parts = ", ".join(f"{loss:.4f}" for loss in losses)
                print(f"{spent:4.0f} s  update {self.steps}  losses by step {parts}", flush=True)
                running, said = index, spent

    def judge(self, stage: Stage, seeds: Sequence[int]) -> dict[str, float]:
        """Mean square distances to the teacher's clips: four steps of the teacher, the student."""
        times, ends = time_steps(STEPS * SUBSTEPS).tolist(), time_steps(STEPS).tolist()
        teacher, student = velocity_of(self.teacher), velocity_of(self.student)
        found = {"four of the teacher's": 0.0, "the student's four": 0.0}
        for seed in seeds:
            noise = initial_noise(
                1, stage.frames, stage.height, stage.width, seed=seed, device=self.device
            )
            truth = walk(teacher, noise, times).clamp(-1, 1)
            for name, velocity in zip(found, (teacher, student), strict=True):
                clip = walk(velocity, noise, ends).clamp(-1, 1)
                found[name] += float(F.mse_loss(clip, truth)) / len(seeds)
        return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m freqopt.models_zoo.training.distil", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of adapter and log")
    parser.add_argument("--seconds", type=float, default=120.0, help="wall clock for training")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--updates", type=int, default=None, help="end after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny clips, for tests")
    given = parser.parse_args(arguments)
    if given.seconds <= 0 or given.rate <= 0 or given.rank < 1:
        parser.error("--seconds, --rate and --rank must be positive")
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; use --device cpu")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` as on the command line."""
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m freqopt.models_zoo.training.distil", *words])
    stages = GPU_STAGES if device.type == "cuda" else CPU_STAGES
    if given.smoke:
        stages = SMOKE_STAGES
    teacher, notes = load_pretrained(), []
    attention: AbstractContextManager[None] = nullcontext()
    if device.type == "cuda":
        backend, said = fastest_attention(stages[-1], teacher.config)
        attention = sdpa_kernel(backend)
        notes.append(said)
        print(said, flush=True)
    distillation = Distillation(teacher, device, given.rank, given.rate)
    last, seeds = stages[-1], (501, 502)
    with attention:
        begun = time.monotonic()
        distillation.run(stages, given.seconds, given.updates)
        trained = time.monotonic() - begun
        # The adapter first: what only shows it must not lose it.
        path = given.out / ADAPTER.name
        save_adapter(
            distillation.student,
            path,
            base=fingerprint(),
            rank=str(given.rank),
            trained_with=command,
        )
        judged = distillation.judge(last, seeds)
        noise = initial_noise(1, last.frames, last.height, last.width, seed=seeds[0], device=device)
        for name, model, steps in (
            ("teacher", distillation.teacher, STEPS * SUBSTEPS),
            ("student", distillation.student, STEPS),
        ):
            clip = walk(velocity_of(model), noise, time_steps(steps).tolist())
            write_contact_sheet(clip[0].clamp(-1, 1), given.out / f"distilled_{name}.png")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    results = {
        "command": command,
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "seconds": round(trained, 1),
        "updates": distillation.steps,
        "parameters": sum(p.numel() for p in distillation.parameters),
        "distance_to_24_steps": judged,
        "stages": [vars(stage) for stage in stages],
        "notes": notes,
        "columns": ["update", "stage", "losses", "seconds"],
        "log": distillation.log,
    }
    (given.out / "distil_log.json").write_text(json.dumps(results, indent=1) + "\n")
    for of, distance in judged.items():
        print(f"mean square distance to {STEPS * SUBSTEPS} steps, {of}: {distance:.5f}")
    print(f"{distillation.steps} updates in {trained:.0f} s; wrote {path}")


if __name__ == "__main__":
    main()
