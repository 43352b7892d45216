"""Squeezes of extents that are not 1, which PyTorch leaves alone and ONNX refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from freqopt.exporters.onnx.export import write_onnx
from freqopt.exporters.program import make_program

pytestmark = pytest.mark.filterwarnings("ignore")


class Squeezing(nn.Module):
    """One that does nothing, one of which a part does, one that is right, and one free extent."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.squeeze(2)
        second = (first + 1).squeeze((0, 2))
        third = (x * 2).squeeze(0)
        return second + third + x.squeeze(1).sum()


def test_a_file_with_squeezes_that_do_nothing_loads(tmp_path: Path) -> None:
    model, free = Squeezing(), torch.export.Dim.AUTO
    program = make_program(model, (torch.randn(1, 5, 3),), dynamic_shapes={"x": {1: free}})
    write_onnx(program, tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    (name,) = (each.name for each in session.get_inputs())
    for length in (5, 9):
        x = torch.randn(1, length, 3)
        (out,) = session.run(None, {name: x.numpy()})
        assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-6)
