"""Makes the plan that ships for the demo on a CPU: `python -m benchmarks.demo_plan`.

Calibration takes many runs of the model, which on two cores is longer than a newcomer waits. Its
inputs are met while the model makes other videos than the demo's, at times from the first step to
the last. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import freqopt
from benchmarks.pages import ROOT
from freqopt.demo.demo import denoising_inputs
from freqopt.demo.settings import default_settings
from freqopt.models_zoo.video_dit import load_pretrained
from freqopt.progress import open_progress

PLAN = ROOT / "freqopt" / "demo" / "video_dit_plan.json"

DENSITY = 0.2
"""Share of pairs attended exactly, which decides the demo's speed; its error is what it shows."""

SAMPLES, PASSES = 6, 36


def main(arguments: list[str] | None = None) -> None:
    """Calibrate, and write the plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--density", type=float, default=DENSITY)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--frames", type=int, default=None, help="of the videos; as in the demo")
    parser.add_argument("--out", type=Path, default=PLAN, help="the file to write")
    given = parser.parse_args(arguments)
    model = load_pretrained()
    settings = default_settings("cpu", frames=given.frames, samples=given.samples)
    with open_progress(True) as bars:
        samples = denoising_inputs(model, settings, bars)
    plan = freqopt.calibrate(
        model,
        samples,
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
