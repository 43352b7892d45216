"""Write a video transformer as a file for TensorRT, and say how far an engine is.

    python examples/build_tensorrt_engine.py [folder]

This version writes model.trt.onnx and its manifest. The plugin that runs freqopt::SplitAttention
inside TensorRT is not part of it, so asking for an engine is an error with that reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from freqopt.exporters.problems import NotAvailableError
from freqopt.exporters.tensorrt_export import export_tensorrt
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).eval()
    example = (torch.randn(1, 3, 5, 24, 32), torch.rand(1))

    artifact = export_tensorrt(model, example, None, folder, build="never")
    print(artifact)
    try:
        export_tensorrt(model, example, None, folder, build="always")
    except NotAvailableError as error:
        print(f"no engine: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "exported-tensorrt"))
