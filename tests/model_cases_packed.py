"""Models whose tokens are packed before the model: only data, ints or the user tell the grid."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TEXT, Grid, Made, build, case, positions, steps, text


def packed(grid: Grid, batch: int, channels: int = 4) -> torch.Tensor:
    """(B, N, C) tokens."""
    return torch.randn(batch, grid[0] * grid[1] * grid[2], channels)


LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
    "cross_attention_dim": 24, "num_layers": 2, "caption_channels": 16,
}  # fmt: skip


def ltx_inputs(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": packed(grid, batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "return_dict": False,
    }


@case(
    "LTXVideoTransformer3DModel", dense=2, others=2,
    note="grid from the rotary table, which the graph makes of three ints",
)  # fmt: skip
def ltx(grid: Grid, batch: int) -> Made:
    return build("LTXVideoTransformer3DModel", **LTX), ltx_inputs(grid, batch)


@case(
    "LTX2VideoTransformer3DModel", dense=2, others=10,
    note="audio attends to itself and to the video; both stay dense",
)  # fmt: skip
def ltx2(grid: Grid, batch: int) -> Made:
    model = build(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    return model, ltx_inputs(grid, batch) | {
        "audio_hidden_states": torch.randn(batch, 9, 4),
        "audio_encoder_hidden_states": text(batch),
        "audio_num_frames": 9,
        "timestep": steps(batch, torch.float32),
        "fps": 25.0,
    }


FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def flux_inputs(grid: Grid, batch: int, axes: int = 3) -> dict[str, Any]:
    places = positions(grid)
    return {
        "hidden_states": packed(grid, batch),
        "encoder_hidden_states": text(batch),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.nn.functional.pad(places, (0, axes - 3)),
        "txt_ids": torch.zeros(TEXT, axes),
        "return_dict": False,
    }


@case("FluxTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def flux(grid: Grid, batch: int) -> Made:
    model = build("FluxTransformer2DModel", **FLUX, pooled_projection_dim=8)
    return model, flux_inputs(grid, batch) | {"pooled_projections": torch.randn(batch, 8)}


@case("Flux2Transformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def flux2(grid: Grid, batch: int) -> Made:
    config = FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 256}
    inputs = flux_inputs(grid, batch, 4) | {"guidance": torch.ones(batch)}
    return build("Flux2Transformer2DModel", **config), inputs


@case("ChromaTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def chroma(grid: Grid, batch: int) -> Made:
    model = build(
        "ChromaTransformer2DModel", **FLUX, approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return model, flux_inputs(grid, batch)


@case(
    "ChromaTransformer2DModel", dense=0, others=2, source="given", image=True,
    note="with attention_mask, which is added to the scores",
)  # fmt: skip
def chroma_masked(grid: Grid, batch: int) -> Made:
    model, inputs = chroma(grid, batch)
    mask = torch.ones(batch, TEXT + grid[1] * grid[2])
    return model, inputs | {"attention_mask": mask}


@case("BriaTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def bria(grid: Grid, batch: int) -> Made:
    config = FLUX | {"axes_dims_rope": (0, 8, 8), "pooled_projection_dim": None}
    return build("BriaTransformer2DModel", **config), flux_inputs(grid, batch)


@case("QwenImageTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def qwen_image(grid: Grid, batch: int) -> Made:
    model = build(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": packed(grid, batch, 16),
        "encoder_hidden_states": text(batch),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [grid] * batch,
        "return_dict": False,
    }
