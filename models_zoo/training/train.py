"""Train the zoo's video DiT on procedural video; in a checkout only.

`python -m freqopt.models_zoo.training.train --out DIR` writes the weights, the training log, a
checkpoint to resume from, and contact sheets of a sampled and of a training video to look at. The
whole run ends within the given minutes plus 40 seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from pathlib import Path

import torch

from freqopt.models_zoo.sampling import sample
from freqopt.models_zoo.training.contact_sheet import write_contact_sheet
from freqopt.models_zoo.training.log import LOG_EVERY, Row
from freqopt.models_zoo.training.loop import (
    CPU_STAGES,
    GPU_STAGES,
    SMOKE_STAGES,
    Stage,
    State,
    Trainer,
    validate,
)
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.models_zoo.video_dit import MAX_BYTES, VideoDiTConfig, save_weights

DATA_STD = 0.45
"""Standard deviation of the procedural videos' pixels, over 32 scenes."""

CONFIG = VideoDiTConfig(data_std=DATA_STD)
SMOKE_CONFIG = VideoDiTConfig(
    width=32, layers=2, mlp_width=64, rope_axes=(4, 6, 6), data_std=DATA_STD
)


def write_results(
    trainer: Trainer, stages: tuple[Stage, ...], out: Path, command: str, steps: int
) -> None:
    """Weights of the moving average, the log, and contact sheets to look at."""
    state, device, last = trainer.state, trainer.device, stages[-1]
    model = state.average.eval()
    weights = out / "video_dit.safetensors"
    save_weights(model, weights, trained_with=command)
    if weights.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{weights} has {weights.stat().st_size} bytes, more than {MAX_BYTES}")
    per_stage = [sum(row.stage == i for row in state.log) * LOG_EVERY for i in range(len(stages))]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    results = {
        "command": command,
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(state.seconds, 1),
        "steps": state.step,
        "steps_per_stage": per_stage,
        "stages": [vars(stage) for stage in stages],
        "notes": state.notes,
        "columns": Row._fields,
        "log": state.log[:: max(len(state.log) // 300, 1)],
    }
    path = out / "train_log.json"
    path.write_text(json.dumps(results, indent=1) + "\n")

    real = render_videos(1, last.frames, last.height, last.width, seed=5, device=device)
    write_contact_sheet(real[0], out / "training_video.png")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with trainer.attending():
        results["validation_loss"] = validate(model, last, device)
        video = sample(
            model.to(dtype),
            frames=last.frames,
            height=last.height,
            width=last.width,
            steps=steps,
            seed=1,
            device=device,
            dtype=dtype,
        )
    write_contact_sheet(video[0], out / "sampled.png")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"loss on videos never trained on: {results['validation_loss']:.4f}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m freqopt.models_zoo.training.train", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of weights, log, checkpoint"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock for training")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile on CUDA")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--smoke", action="store_true", help="tiny clips and model, for tests")
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.rate <= 0 or given.sample_steps < 1:
        parser.error("--minutes, --rate and --sample-steps must be positive")
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; use --device cpu")
    checkpoint = given.out / "checkpoint.pt"
    if given.resume and not checkpoint.exists():
        parser.error(f"--resume: there is no checkpoint at {checkpoint}")
    if checkpoint.exists() and not given.resume:
        parser.error(f"{checkpoint} exists; pass --resume to go on with it, or another --out")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` as on the command line."""
    started = time.monotonic()
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m freqopt.models_zoo.training.train", *words])
    stages, config = (GPU_STAGES if device.type == "cuda" else CPU_STAGES), CONFIG
    if given.smoke:
        stages, config = SMOKE_STAGES, SMOKE_CONFIG
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    state = State(config, device, given.seed, given.rate)
    if given.resume:
        state.load(given.out / "checkpoint.pt", device)
    interrupted: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        trainer = Trainer(
            state,
            stages,
            device=device,
            seed=given.seed,
            rate=given.rate,
            compiled=device.type == "cuda" and not given.eager,
        )
        trainer.run(
            seconds=given.minutes * 60,
            started=started,
            out=given.out,
            stop=lambda: bool(interrupted),
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        print(f"stopped at step {state.step}; go on with --resume")
        return
    write_results(trainer, stages, given.out, command, given.sample_steps)
    print(f"{state.step} steps in {state.seconds:.0f} s; wrote {given.out}/video_dit.safetensors")


if __name__ == "__main__":
    main()
