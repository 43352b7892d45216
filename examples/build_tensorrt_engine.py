"""Write a video transformer for TensorRT, and build the engine where TensorRT is installed.

    python examples/build_tensorrt_engine.py [folder]

The folder gets model.trt.onnx, the plugin's sources with the compiled kernels, build_engine.py and
a manifest. Copied to a machine with TensorRT, `python build_engine.py` there makes the engine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import freqopt
from freqopt.exporters.runner import run_artifact
from freqopt.exporters.tensorrt.export import export_tensorrt
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # untrained models end in zeros
    inputs = {"video": torch.randn(1, 3, 5, 24, 32), "timestep": torch.rand(1)}

    # The plugin takes budgets, hence a plan; a real one is calibrated on real inputs.
    plan = freqopt.calibrate(model, [inputs] * 2, target_error=0.05, progress=False)
    artifact = export_tensorrt(model, (), inputs, folder, plan=plan)
    print(artifact)
    if (folder / "model.engine").is_file():
        print(run_artifact(artifact, inputs, trust=True))  # the engine is a program: ours


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "exported-tensorrt"))
