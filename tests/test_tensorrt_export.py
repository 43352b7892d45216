"""What `export_tensorrt` writes, and what it says about what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from freqopt.errors import OptionError
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.problems import NotAvailableError
from freqopt.exporters.runner import run_artifact
from freqopt.exporters.tensorrt_export import export_tensorrt
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def small() -> tuple[VideoDiT, tuple[torch.Tensor, ...]]:
    config = VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    return VideoDiT(config).eval(), (torch.randn(1, 3, 5, 24, 32), torch.rand(1))


def test_the_file_has_bare_nodes_and_its_budgets(tmp_path: Path) -> None:
    model, args = small()
    made = export_tensorrt(model, args, None, tmp_path)
    assert Artifact.load(tmp_path).sites == made.sites
    proto = onnx.load(made.model_path)
    assert not proto.functions
    (node,) = (n for n in proto.graph.node if n.domain == "freqopt")
    assert node.op_type == "SplitAttention"
    names = {initialiser.name for initialiser in proto.graph.initializer}
    assert {"freqopt.budget.blocks.0.attn", "freqopt.order.5x6x8"} <= names
    assert "no engine was built" in made.notes[-1]
    with pytest.raises(NotAvailableError, match="tensorrt artifact"):
        run_artifact(made, {})


def test_an_engine_is_not_promised(tmp_path: Path) -> None:
    model, args = small()
    with pytest.raises(NotAvailableError, match="plugin"):
        export_tensorrt(model, args, None, tmp_path, build="always")
    with pytest.raises(OptionError, match="auto, never, always"):
        export_tensorrt(model, args, None, tmp_path, build="maybe")
