"""The training loop of the zoo's video DiT: stages of growing resolution within a wall clock.

The clock rules, so that one command ends on time on any device: every step asks it which stage is
due, what the learning rate is and whether to stop, compile time included.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from freqopt.models_zoo.training.log import LOG_EVERY, Report, Row
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

log = logging.getLogger(__name__)

EMA_DECAY = 0.998
WARMUP_STEPS = 200
CHECKPOINT_SECONDS = 60.0
STEPS_IN_FLIGHT = 3
LOGIT_STD = 1.3
"""Spread of the times' logits: wide enough that the last, nearly clean steps are learned too."""

GOLDEN = 0.6180339887498949


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


GRADIENT_TOLERANCE = 0.1
"""Relative L2 difference of compiled from eager gradients beyond which a stage runs eagerly.

Rounding accounts for 0.01. With torch 2.11 a compiled block at 21 x 30 x 52 tokens returned
gradients of the modulation two thousand times too large on an H200, with either attention kernel.
"""

GPU_STAGES = (
    Stage(0.45, 8, 60, 104, 16, 1.5),
    Stage(0.30, 13, 88, 152, 4, 2.0),
    Stage(0.25, 21, 120, 208, 1, 2.5),
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
            lr=rate,
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )
        self.step = 0
        self.seconds = 0.0
        self.log: list[Row] = []
        self.notes: list[str] = []

    def save(self, path: Path) -> None:
        """Write a checkpoint; readers never see half of one."""
        parts = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "log": [tuple(row) for row in self.log],
            "notes": self.notes,
        }
        temporary = path.with_suffix(".part")
        torch.save(parts, temporary)
        temporary.replace(path)

    def load(self, path: Path, device: torch.device) -> None:
        """Go on from a checkpoint."""
        parts = torch.load(path, map_location=device, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        self.optimiser.load_state_dict(parts["optimiser"])
        self.step, self.seconds, self.notes = parts["step"], parts["seconds"], parts["notes"]
        self.log = [Row(*row) for row in parts["log"]]

    def note(self, said: str) -> None:
        """Say something that the training log should keep."""
        self.notes.append(said)
        print(said, flush=True)


def stage_at(stages: tuple[Stage, ...], progress: float) -> int:
    """Index of the stage in force after a share `progress` of the time."""
    edge = 0.0
    for index, stage in enumerate(stages):
        edge += stage.share
        if progress < edge:
            return index
    return len(stages) - 1


def learning_rate(
    peak: float, step: int, progress: float, *, warm_up: int = WARMUP_STEPS, last: float = 0.01
) -> float:
    """Linear warm-up in so many steps, cosine fall over the wall clock to a share of the peak."""
    warm = min((step + 1) / warm_up, 1.0)
    return peak * warm * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def draw_times(batch: int, step: int, shift: float, generator: torch.Generator) -> Tensor:
    """Logit-normal times (batch,) in (0, 1), shifted towards noise (arXiv 2403.03206).

    Spread evenly over the batch and, by the golden ratio, over consecutive steps, so that a batch
    of one still sees all times in turn.
    """
    device = generator.device
    jitter = torch.rand(1, device=device, generator=generator) / batch
    even = torch.arange(batch, device=device) / batch
    uniform = (even + jitter + GOLDEN * step).remainder(1).clamp(1e-4, 1 - 1e-4)
    t = torch.sigmoid(LOGIT_STD * math.sqrt(2) * torch.erfinv(2 * uniform - 1))
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(model: nn.Module, video: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity, noise - video, at times t (batch,)."""
    noise = torch.randn(video.shape, device=video.device, generator=generator)
    mixing = t[:, None, None, None, None]
    noisy = (1 - mixing) * video + mixing * noise
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        velocity = model(noisy, t)
    return F.mse_loss(velocity.float(), noise - video)


@torch.no_grad()
def validate(model: nn.Module, stage: Stage, device: torch.device) -> float:
    """Mean loss on fixed videos and times that training never draws."""
    generator = torch.Generator(device).manual_seed(123)
    losses = []
    for index in range(9):
        video = render_videos(
            1, stage.frames, stage.height, stage.width, seed=2**40 + index % 3, device=device
        )
        t = torch.full((1,), 0.1 * (index + 1), device=device)
        losses.append(flow_loss(model, video, t, generator))
    return float(torch.stack(losses).mean())


def compile_blocks(model: VideoDiT) -> None:
    """Compile the repeated block: one graph for all layers, and one for each stage's shape."""
    for block in model.blocks:
        block.compile(dynamic=False)


def uncompile_blocks(model: VideoDiT) -> None:
    """Run the blocks eagerly again."""
    for block in model.blocks:
        block._compiled_call_impl = None


@contextmanager
def eager_blocks(model: VideoDiT) -> Iterator[None]:
    """Run compiled blocks eagerly for a while; what was compiled is kept."""
    compiled = [block._compiled_call_impl for block in model.blocks]
    uncompile_blocks(model)
    try:
        yield
    finally:
        for block, call in zip(model.blocks, compiled, strict=True):
            block._compiled_call_impl = call


def fastest_attention(stage: Stage, config: VideoDiTConfig) -> tuple[SDPBackend, str]:
    """The faster of torch's fused attentions, forward and backward, at a stage's length on CUDA.

    One that fails, or whose gradients stray from the flash kernel's, is passed over.
    """
    grid = (stage.frames // config.patch[0], stage.height // config.patch[1])
    tokens = grid[0] * grid[1] * (stage.width // config.patch[2])
    generator = torch.Generator("cuda").manual_seed(0)
    parts = [
        torch.randn(
            stage.batch,
            tokens,
            config.heads,
            config.head_dim,
            device="cuda",
            dtype=torch.bfloat16,
            generator=generator,
        ).transpose(1, 2)
        for _ in range(4)
    ]
    wanted = parts.pop()
    best, best_ms, said, reference = SDPBackend.FLASH_ATTENTION, math.inf, [], None
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        inputs = [part.detach().requires_grad_() for part in parts]
        try:
            with sdpa_kernel(backend):
                for _ in range(3):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    out = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
                    found = [out, *torch.autograd.grad(out, inputs, wanted)]
                    end.record()
            torch.cuda.synchronize()
        except RuntimeError as error:
            said.append(f"{backend.name} fails: {str(error).splitlines()[0]}")
            continue
        reference = reference or found
        stray = max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(found, reference, strict=True)
        )
        milliseconds = start.elapsed_time(end)
        said.append(f"{backend.name} {milliseconds:.1f} ms")
        if not stray < 0.02:
            said.append(f"{backend.name} is off by {stray:.3f}")
        elif milliseconds < best_ms:
            best, best_ms = backend, milliseconds
    return best, f"attention at {tokens} tokens, both ways: {', '.join(said)}; using {best.name}"


class Pace:
    """Keeps the host at most a few steps ahead of the device, so that its clock means something."""

    def __init__(self, device: torch.device) -> None:
        self.events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None

    def step(self) -> None:
        """Call after each step has been issued."""
        if self.events is None:
            return
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > STEPS_IN_FLIGHT:
            self.events.popleft().synchronize()


class Trainer:
    """One run of the loop over a `State`."""

    def __init__(
        self,
        state: State,
        stages: tuple[Stage, ...],
        *,
        device: torch.device,
        seed: int,
        rate: float,
        compiled: bool,
    ) -> None:
        self.state, self.stages, self.device = state, stages, device
        self.seed, self.rate, self.compiled = seed, rate, compiled
        self.generator = torch.Generator(device).manual_seed(seed + 7 + state.step)
        self.attention: SDPBackend | None = None
        if device.type == "cuda":
            self.attention, said = fastest_attention(stages[-1], state.model.config)
            state.note(said)
        if compiled:
            compile_blocks(state.model)

    def attending(self) -> AbstractContextManager[None]:
        """The chosen attention kernel, in force."""
        return nullcontext() if self.attention is None else sdpa_kernel(self.attention)

    def run(self, *, seconds: float, started: float, out: Path, stop: Callable[[], bool]) -> None:
        """Train until all runs of this folder have used `seconds`, or `stop()` is true.

        Args:
            started: time.monotonic() at which this run's use of the clock began.
        """
        state, before = self.state, self.state.seconds
        report = Report(seconds, out / "train_log.csv")
        saved, marked, marked_step, running = time.monotonic(), time.monotonic(), state.step, -1
        losses, pace = torch.zeros((), device=self.device), Pace(self.device)
        try:
            while not stop():
                state.seconds = before + time.monotonic() - started
                progress = state.seconds / seconds
                if progress >= 1:
                    break
                index = stage_at(self.stages, progress)
                with self.attending():
                    losses += self.first_step(index) if index != running else self.step(index)
                running = index
                self.update(progress)
                pace.step()
                if state.step % LOG_EVERY:
                    continue
                value = float(losses) / LOG_EVERY
                losses.zero_()
                now = time.monotonic()
                step_ms = 1000 * (now - marked) / max(state.step - marked_step, 1)
                marked, marked_step = now, state.step
                state.log.append(Row(state.step, index, value, round(state.seconds, 2)))
                report.row(state.log[-1], step_ms)
                if not math.isfinite(value):
                    raise RuntimeError(
                        f"loss is {value} at step {state.step}; lower --rate and --resume from the "
                        f"last checkpoint"
                    )
                if now - saved > CHECKPOINT_SECONDS:
                    state.save(out / "checkpoint.pt")
                    saved = now
        finally:
            report.close()
            if all(math.isfinite(row.loss) for row in state.log[-1:]):
                state.save(out / "checkpoint.pt")

    def step(self, index: int) -> Tensor:
        """Forward and backward at a stage; returns the loss."""
        stage, state = self.stages[index], self.state
        with torch.no_grad():
            video = render_videos(
                stage.batch,
                stage.frames,
                stage.height,
                stage.width,
                seed=self.seed * 1_000_003 + state.step,
                device=self.device,
            )
        t = draw_times(stage.batch, state.step, stage.shift, self.generator)
        loss = flow_loss(state.model, video, t, self.generator)
        loss.backward()
        return loss.detach()

    def first_step(self, index: int) -> Tensor:
        """The first step of a stage, where compilation happens: eager from here on if it fails."""
        begun = time.monotonic()
        draws = self.generator.get_state()
        try:
            loss = self.step(index)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.compiled:
                raise
            warnings.warn(
                f"compiling the block failed, so training goes on eagerly and slower: {error}",
                stacklevel=2,
            )
            self.state.note(f"eager from stage {index + 1}: {type(error).__name__}: {error}")
            self.compiled, self.attention = False, SDPBackend.FLASH_ATTENTION
            uncompile_blocks(self.state.model)
            self.state.optimiser.zero_grad(set_to_none=True)
            with self.attending():
                loss = self.step(index)
        if self.compiled:
            self.check_gradients(index, draws)
        value = float(loss)
        self.state.note(
            f"stage {index + 1} of {len(self.stages)}: first step took "
            f"{time.monotonic() - begun:.1f} s, loss {value:.4f}"
        )
        return loss

    def check_gradients(self, index: int, draws: Tensor) -> None:
        """Put eager gradients in place of the compiled ones; stay eager if they disagree.

        draws: the generator's state before the compiled step.
        """
        model, optimiser = self.state.model, self.state.optimiser
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        optimiser.zero_grad(set_to_none=True)
        self.generator.set_state(draws)
        with eager_blocks(model):
            self.step(index)
        off, whole = torch.zeros(2, device=self.device, dtype=torch.float64)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                off += (found[name] - parameter.grad).double().square().sum()
                whole += parameter.grad.double().square().sum()
        stray = float((off / whole).sqrt())
        if stray < GRADIENT_TOLERANCE:
            return
        said = f"compiled gradients are off by {stray:.3g}: eager from stage {index + 1}"
        warnings.warn(f"{said} on, and slower", stacklevel=2)
        self.state.note(said)
        self.compiled = False
        uncompile_blocks(model)

    def update(self, progress: float) -> None:
        """Optimiser and moving average."""
        state = self.state
        for group in state.optimiser.param_groups:
            group["lr"] = learning_rate(self.rate, state.step, progress)
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimiser.step()
        state.optimiser.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(state.average.parameters()), list(state.model.parameters()), 1 - decay
            )
        state.step += 1
