"""Three diffusers models, each exported once with free extents and run at two token counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
diffusers = pytest.importorskip("diffusers")

from attention_cases import relative

from freqopt.exporters.onnx.export import write_onnx
from freqopt.exporters.program import make_program
from freqopt.exporters.runner import run_artifact

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("symbols")]
FREE = torch.export.Dim.AUTO
Call = Callable[[int, int, int], dict[str, Any]]


def wan() -> tuple[nn.Module, Call, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )

    def call(t: int, h: int, w: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, t, h, w),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 7, 16),
        }

    return model, call, {"hidden_states": {2: FREE, 3: FREE, 4: FREE}}


def hunyuan() -> tuple[nn.Module, Call, dict[str, Any]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    mask = torch.ones(1, 9)
    mask[:, 6:] = 0

    def call(t: int, h: int, w: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, t, h, w),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 9, 16),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, 8),
            "guidance": torch.tensor([6000.0]),
        }

    return model, call, {"hidden_states": {2: FREE, 3: FREE, 4: FREE}}


def cogvideox() -> tuple[nn.Module, Call, dict[str, Any]]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=20,
        sample_height=12,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )

    def call(t: int, h: int, w: int) -> dict[str, Any]:
        size = (h // 2, w // 2)
        return {
            "hidden_states": torch.randn(1, t, 4, h, w),
            "encoder_hidden_states": torch.randn(1, 6, 16),
            "timestep": torch.tensor([500]),
            "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), size), size, t),
        }

    rotary = ({0: FREE}, {0: FREE})
    return model, call, {"hidden_states": {1: FREE, 3: FREE, 4: FREE}, "image_rotary_emb": rotary}


def halved(arguments: dict[str, Any]) -> dict[str, Any]:
    """float32 tensors as float16: inputs of a model in half precision."""

    def half(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(half(x) for x in value)
        is_float = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.half() if is_float else value

    return {name: half(value) for name, value in arguments.items()}


def flat(call: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by the names of the exported inputs."""
    found = {}
    for name, value in call.items():
        if isinstance(value, tuple):
            found |= {f"{name}_{i}": x for i, x in enumerate(value)}
        elif isinstance(value, Tensor):
            found[name] = value
    return found


CLASSES = {
    "wan": (wan, 1, (0, 0)),
    "hunyuan": (hunyuan, 2, (0, 9)),
    "cogvideox": (cogvideox, 1, (6, 0)),
}
SINGLE, HALF = (torch.float32, 1e-5), (torch.float16, 1e-2)


@pytest.mark.parametrize(
    ("make", "split", "text", "dtype", "bound"),
    [
        *(pytest.param(*each, *SINGLE, id=name) for name, each in CLASSES.items()),
        # In half precision test_onnx_export has a model in every run.
        pytest.param(*CLASSES["cogvideox"], *HALF, id="cogvideox-half", marks=pytest.mark.slow),
        pytest.param(*CLASSES["wan"], *HALF, id="wan-half", marks=pytest.mark.slow),
        pytest.param(*CLASSES["hunyuan"], *HALF, id="hunyuan-half", marks=pytest.mark.slow),
    ],
)
def test_diffusers_model(
    make: Callable[[], Any],
    split: int,
    text: tuple[int, int],
    dtype: torch.dtype,
    bound: float,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, call, free = make()
    model.eval()
    for parameter in model.parameters():  # zero gates would hide a wrong attention
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    model.to(dtype)
    convert = halved if dtype == torch.float16 else dict
    first = convert({**call(3, 12, 20), "return_dict": False})
    shapes = {name: free.get(name) for name in first}
    program = make_program(model, (), first, dynamic_shapes=shapes)
    artifact = write_onnx(program, tmp_path)
    assert len(artifact.sites) == split
    assert all("different tokens" in r or "no grid" in r for r in artifact.dense_sites.values())
    reference = program.exported.module()
    for arguments in (first, convert({**call(5, 14, 18), "return_dict": False})):
        with torch.no_grad():
            expected, dense = reference(**arguments)[0], model(**arguments)[0]
        assert relative(expected, dense) > 1e-4, "the split must show"
        found = run_artifact(artifact, flat(arguments), provider="cpu", threads=1)
        assert relative(found.outputs["output"], expected) < bound
