"""Models whose tokens are packed before the model: only data, ints or the user tell the grid."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TEXT, Grid, Made, build, case, positions, steps, text


def packed(grid: Grid, batch: int, channels: int = 4) -> torch.Tensor:
    """(B, N, C) tokens."""
    return torch.randn(batch, grid[0] * grid[1] * grid[2], channels)


LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 16,
}


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
    "LTXVideoTransformer3DModel",
    dense=2,
    others=2,
    note="grid from the rotary table, which the graph makes of three ints",
)
def ltx(grid: Grid, batch: int) -> Made:
    return build("LTXVideoTransformer3DModel", **LTX), ltx_inputs(grid, batch)


@case(
    "LTX2VideoTransformer3DModel",
    dense=2,
    others=10,
    note="audio attends to itself and to the video; both stay dense",
)
def ltx2(grid: Grid, batch: int) -> Made:
    model = build(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )
    return model, ltx_inputs(grid, batch) | {
        "audio_hidden_states": torch.randn(batch, 9, 4),
        "audio_encoder_hidden_states": text(batch),
        "audio_num_frames": 9,
        "timestep": steps(batch, torch.float32),
        "fps": 25.0,
    }


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


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


FLUX3 = {
    "in_channels": 4,
    "cond_in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "timestep_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}


def flux3_inputs(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": packed(grid, batch),
        "encoder_hidden_states": text(batch),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cat([positions(grid), torch.zeros(grid[1] * grid[2], 1)], 1),
        "txt_ids": torch.zeros(TEXT, 4),
        "return_dict": False,
    }


@case(
    "Flux3Transformer2DModel",
    dense=3,
    others=1,
    source="given",
    image=True,
    each=(("self", 0, 0), ("joint", TEXT, 0), ("joint", TEXT, 0)),
    note="image and text alone first, then together",
)
def flux3(grid: Grid, batch: int) -> Made:
    return build("Flux3Transformer2DModel", **FLUX3), flux3_inputs(grid, batch)


@case(
    "Flux3Transformer2DModel",
    dense=3,
    others=2,
    source="given",
    image=True,
    each=(("self", 0, 0), ("joint", TEXT, 80), ("joint", TEXT, 80)),
    note="a reference image of 80 tokens comes last and stays exact",
)
def flux3_reference(grid: Grid, batch: int) -> Made:
    return build("Flux3Transformer2DModel", **FLUX3), flux3_inputs(grid, batch) | {
        "image_cond_hidden_states": torch.randn(batch, 80, 4),
        "image_cond_ids": torch.zeros(80, 4),
    }


@case("ChromaTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def chroma(grid: Grid, batch: int) -> Made:
    model = build(
        "ChromaTransformer2DModel",
        **FLUX,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return model, flux_inputs(grid, batch)


@case(
    "ChromaTransformer2DModel",
    dense=0,
    others=2,
    source="given",
    image=True,
    note="with attention_mask, which is added to the scores",
)
def chroma_masked(grid: Grid, batch: int) -> Made:
    model, inputs = chroma(grid, batch)
    mask = torch.ones(batch, TEXT + grid[1] * grid[2])
    return model, inputs | {"attention_mask": mask}


@case("BriaTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def bria(grid: Grid, batch: int) -> Made:
    config = FLUX | {"axes_dims_rope": (0, 8, 8), "pooled_projection_dim": None}
    return build("BriaTransformer2DModel", **config), flux_inputs(grid, batch)


@case("BriaFiboTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def bria_fibo(grid: Grid, batch: int) -> Made:
    model = build(
        "BriaFiboTransformer2DModel",
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=8,
    )
    return model, {
        "hidden_states": text(batch, 4, grid[1] * grid[2]),
        "encoder_hidden_states": text(batch),
        "text_encoder_layers": [text(batch, 8), text(batch, 8)],
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions(grid),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


@case("OvisImageTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def ovis(grid: Grid, batch: int) -> Made:
    return build("OvisImageTransformer2DModel", **FLUX), flux_inputs(grid, batch)


@case(
    "LongCatImageTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True
)
def longcat(grid: Grid, batch: int) -> Made:
    model = build("LongCatImageTransformer2DModel", **FLUX, pooled_projection_dim=8)
    return model, flux_inputs(grid, batch) | {"guidance": torch.ones(batch)}


@case("QwenImageTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True)
def qwen_image(grid: Grid, batch: int) -> Made:
    model = build(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": packed(grid, batch, 16),
        "encoder_hidden_states": text(batch),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [grid] * batch,
        "return_dict": False,
    }


@case(
    "NucleusMoEImageTransformer2DModel",
    dense=2,
    kind="text in keys",
    after=TEXT,
    source="given",
    image=True,
    note="image queries, text in the keys only",
)
def nucleus(grid: Grid, batch: int) -> Made:
    model = build(
        "NucleusMoEImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )
    return model, {
        "hidden_states": packed(grid, batch, 16),
        "encoder_hidden_states": text(batch),
        "timestep": torch.ones(batch),
        "img_shapes": [grid] * batch,
        "return_dict": False,
    }


@case(
    "Krea2Transformer2DModel",
    dense=2,
    others=2,
    kind="joint",
    before=TEXT,
    source="given",
    image=True,
    note="grouped heads",
)
def krea2(grid: Grid, batch: int) -> Made:
    model = build(
        "Krea2Transformer2DModel",
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": packed(grid, batch),
        "encoder_hidden_states": torch.randn(batch, TEXT, 2, 16),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions(grid)]),
        "return_dict": False,
    }


@case(
    "JoyImageEditPlusTransformer3DModel",
    dense=2,
    kind="joint",
    after=TEXT,
    source="given",
    note="the mask is filled item by item of the batch",
)
def joyimage_plus(grid: Grid, batch: int) -> Made:
    model = build(
        "JoyImageEditPlusTransformer3DModel",
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    kept = torch.ones(batch, TEXT)
    kept[:, 5:] = 0
    return model, {
        "hidden_states": torch.randn(batch, grid[0] * grid[1] * grid[2], 4, 1, 2, 2),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_mask": kept,
        "shape_list": [[grid]] * batch,
        "return_dict": False,
    }


@case(
    "Cosmos3OmniTransformer",
    dense=2,
    others=2,
    kind="text in keys",
    before=TEXT,
    source="given",
    batches=(1,),
    note="video queries, text in the keys only; the text's own attention is causal",
)
def cosmos3(grid: Grid, batch: int) -> Made:
    model = build(
        "Cosmos3OmniTransformer",
        head_dim=12,
        hidden_act="relu2",
        hidden_size=24,
        intermediate_size=24,
        latent_channel=2,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=2,
        qk_norm_for_text=False,
        rms_norm_eps=1e-5,
        rope_axes_dim=[2, 2, 2],
        rope_theta=1e8,
        vocab_size=32,
    )
    t, h, w = grid
    vision = torch.arange(TEXT, TEXT + t * h * w)
    places = TEXT + positions(grid).T.long()
    return model, {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([torch.arange(TEXT).expand(3, -1), places], 1),
        "und_len": TEXT,
        "sequence_length": TEXT + t * h * w,
        "vision_tokens": [torch.randn(1, 2, t, h, w)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.ones(t * h * w),
        "vision_noisy_frame_indexes": [torch.arange(t)],
    }


@case(
    "MiniMaxH3Transformer3DModel",
    dense=2,
    others=1,
    kind="joint",
    before=TEXT,
    after=5,
    source="given",
    note="text, video and audio are put in place by index, as they are written",
)
def minimax_h3(grid: Grid, batch: int) -> Made:
    model = build(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=4,
    )
    video, audio = grid[0] * grid[1] * grid[2], 5
    counts = torch.tensor([TEXT, video, audio])
    text_at, video_at, audio_at = torch.arange(int(counts.sum())).split(counts.tolist())
    places = [torch.zeros(TEXT, 3), positions(grid), torch.zeros(audio, 3)]
    return model, {
        "hidden_states": packed(grid, batch, 16),
        "audio_hidden_states": torch.randn(batch, audio, 4),
        "encoder_hidden_states": text(batch),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(int(counts.sum()), dtype=torch.int64),
        "token_tags": torch.repeat_interleave(torch.tensor([1, 0, 2]), counts),
        "position_ids": torch.cat(places).long(),
        "text_indices": text_at,
        "video_indices": video_at,
        "audio_indices": audio_at,
        "return_dict": False,
    }
