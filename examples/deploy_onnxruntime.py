"""Export a video transformer and run the file under ONNX Runtime, on a GPU with our kernels.

    python examples/deploy_onnxruntime.py [folder]

A tiny untrained model keeps this to seconds; a calibrated plan takes the place of the default
density in real use: `export_onnx(..., plan=freqopt.Plan.load("plan.json"))`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from freqopt.exporters.onnx.export import export_onnx
from freqopt.exporters.runner import run_artifact
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # untrained models end in zeros

    # Batch, frames, height and width stay free, so one file serves every size.
    free = torch.export.Dim.AUTO
    shapes = ({0: free, 2: free, 3: free, 4: free}, {0: free})
    example = (torch.randn(2, 3, 5, 24, 32), torch.rand(2))
    artifact = export_onnx(model, example, None, folder, dynamic_shapes=shapes)
    print(artifact)

    inputs = {"video": torch.randn(1, 3, 4, 36, 40), "timestep": torch.rand(1)}
    # The runner checks hashes, refuses a silent fall to the CPU, and tells which nodes ran where.
    # On a GPU the artifact's library attends; on a CPU the function body in the file does.
    result = run_artifact(artifact, inputs)
    print(result)

    with torch.no_grad():
        dense = model(**inputs)
    out = result.outputs["output"]
    print(f"split and dense attention differ by {float((out - dense).norm() / dense.norm()):.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "exported"))
