"""Makes the plan that ships for the demo on a CPU: `python -m benchmarks.demo_plan`.

Calibration takes many runs of the model, which on two cores is longer than a newcomer waits. Its
inputs are procedural videos with noise, as the model was trained on; the demo then measures the
plan's error on the steps of a sampled video. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import freqopt
from benchmarks.pages import ROOT
from freqopt.demo.settings import Settings, default_settings
from freqopt.models_zoo.sampling import initial_noise, time_steps
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.models_zoo.video_dit import load_pretrained

PLAN = ROOT / "freqopt" / "demo" / "video_dit_plan.json"

DENSITY = 0.2
"""Share of pairs attended exactly, which decides the demo's speed; its error is what it shows."""

SAMPLES, PASSES, SEED = 6, 36, 1000


def noised_videos(settings: Settings, count: int, seed: int = SEED) -> list[dict[str, Tensor]]:
    """Inputs of the model at times from the demo's first step to its last, of a video each."""
    size = settings.frames, settings.height, settings.width
    videos = render_videos(count, *size, seed=seed, device=torch.device("cpu"))
    noise = initial_noise(count, *size, seed=seed, device="cpu")
    steps = time_steps(settings.steps).tolist()
    last = settings.steps - 1  # behind it stands 0, where nothing is left to do
    times = [steps[round(i * last / max(count - 1, 1))] for i in range(count)]
    return [
        {
            "video": (1 - time) * videos[i : i + 1] + time * noise[i : i + 1],
            "timestep": torch.tensor([time]),
        }
        for i, time in enumerate(times)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Calibrate, and write the plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--density", type=float, default=DENSITY)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--frames", type=int, default=None, help="of the videos; as in the demo")
    parser.add_argument("--out", type=Path, default=PLAN, help="the file to write")
    given = parser.parse_args(arguments)
    settings = default_settings("cpu", frames=given.frames)
    plan = freqopt.calibrate(
        load_pretrained(),
        noised_videos(settings, given.samples),
        target_density=given.density,
        passes=given.passes,
        rounds=0,
        checkpoint=given.out.with_suffix(".resume"),
    )
    plan.save(given.out)
    print(plan)
    print(f"wrote {given.out}, {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
