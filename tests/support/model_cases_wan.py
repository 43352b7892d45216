"""Wan and what descends from it: SkyReels, AnyFlow, Helios."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import Grid, Made, build, case, latents, steps, text

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_inputs(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch, channels),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("WanTransformer3DModel", dense=2, others=2)
def wan(grid: Grid, batch: int) -> Made:
    return build("WanTransformer3DModel", **WAN), wan_inputs(grid, batch)


@case("WanTransformer3DModel", dense=2, others=4, note="image to video")
def wan_i2v(grid: Grid, batch: int) -> Made:
    config = WAN | {"in_channels": 8, "image_dim": 24, "added_kv_proj_dim": 32}
    model = build("WanTransformer3DModel", **config)
    inputs = wan_inputs(grid, batch, 8)
    return model, inputs | {"encoder_hidden_states_image": text(batch, 24, 9)}


@case("WanVACETransformer3DModel", dense=4, others=4, note="with a second stream of control blocks")
def wan_vace(grid: Grid, batch: int) -> Made:
    model = build("WanVACETransformer3DModel", **WAN, vace_layers=[0, 1], vace_in_channels=12)
    return model, wan_inputs(grid, batch) | {"control_hidden_states": latents(grid, batch, 12)}


@case("WanTransformer3DModel", dense=2, others=2, note="patches of 1 x 3 x 3")
def wan_patch3(grid: Grid, batch: int) -> Made:
    model = build("WanTransformer3DModel", **(WAN | {"patch_size": (1, 3, 3)}))
    return model, wan_inputs(grid, batch) | {
        "hidden_states": latents(grid, batch, patch=(1, 3, 3)),
    }


@case("WanTransformer3DModel", dense=2, others=2, note="2.2: one time step per token", batches=(1,))
def wan22(grid: Grid, batch: int) -> Made:
    tokens = grid[0] * grid[1] * grid[2]
    return build("WanTransformer3DModel", **WAN), {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch, tokens), 500.0),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("WanAnimateTransformer3DModel", dense=2, others=3, grids=((21, 6, 8),), batches=(1,))
def wan_animate(grid: Grid, batch: int) -> Made:
    model = build(
        "WanAnimateTransformer3DModel",
        **(WAN | {"in_channels": 12}),
        latent_channels=4,
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return model, {
        "hidden_states": latents(grid, batch, 12),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_image": text(batch, 16, 12),
        "pose_hidden_states": latents((grid[0] - 1, *grid[1:]), batch),
        "face_pixel_values": torch.randn(batch, 3, 77, 16, 16),
        "return_dict": False,
    }


@case("ChronoEditTransformer3DModel", dense=2, others=2)
def chronoedit(grid: Grid, batch: int) -> Made:
    model = build("ChronoEditTransformer3DModel", **WAN, rope_temporal_skip_len=8)
    return model, wan_inputs(grid, batch)


@case("SkyReelsV2Transformer3DModel", dense=2, others=2)
def skyreels(grid: Grid, batch: int) -> Made:
    return build("SkyReelsV2Transformer3DModel", **WAN), wan_inputs(grid, batch)


@case(
    "SkyReelsV2Transformer3DModel",
    dense=0,
    others=4,
    source="",
    grids=((4, 6, 10),),
    batches=(1,),
    note="frame blocks see the earlier ones only",
)
def skyreels_causal(grid: Grid, batch: int) -> Made:
    return skyreels_diffusion_forcing(grid, batch, 2)


@case("SkyReelsV2Transformer3DModel", dense=2, others=2, batches=(1,), note="diffusion forcing")
def skyreels_forcing(grid: Grid, batch: int) -> Made:
    return skyreels_diffusion_forcing(grid, batch, 1)


def skyreels_diffusion_forcing(grid: Grid, batch: int, blocks: int) -> Made:
    config = WAN | {"inject_sample_info": True, "num_frame_per_block": blocks}
    inputs = wan_inputs(grid, batch) | {
        "timestep": torch.full((batch, grid[0]), 500),
        "enable_diffusion_forcing": True,
        "fps": torch.zeros(batch, dtype=torch.int64),
    }
    return build("SkyReelsV2Transformer3DModel", **config), inputs


@case("AnyFlowTransformer3DModel", dense=2, others=2)
def anyflow(grid: Grid, batch: int) -> Made:
    model = build("AnyFlowTransformer3DModel", **WAN, gate_value=0.25, deltatime_type="r")
    return model, {
        "hidden_states": latents(grid, batch).transpose(1, 2).contiguous(),
        "timestep": torch.full((batch, grid[0]), 500.0),
        "r_timestep": torch.full((batch, grid[0]), 250.0),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case(
    "AnyFlowFARTransformer3DModel",
    dense=0,
    others=4,
    source="",
    grids=((3, 6, 10),),
    note="chunks of frames see the earlier ones: FlexAttention with a block mask",
)
def anyflow_far(grid: Grid, batch: int) -> Made:
    model = build(
        "AnyFlowFARTransformer3DModel",
        patch_size=(1, 2, 2),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
        chunk_partition=(1, 2),
    )
    return model, {
        "hidden_states": latents(grid, batch).transpose(1, 2).contiguous(),
        "timestep": torch.full((batch, grid[0]), 500.0),
        "r_timestep": torch.full((batch, grid[0]), 400.0),
        "encoder_hidden_states": text(batch),
        "chunk_partition": [1, grid[0] - 1],
        "return_dict": False,
    }


HELIOS = {key: WAN[key] for key in WAN if key not in ("rope_max_seq_len",)} | {
    "rope_dim": (4, 6, 6),
    "cross_attn_norm": True,
}


@case("HeliosTransformer3DModel", dense=2, others=2, note="without history frames")
def helios(grid: Grid, batch: int) -> Made:
    config = HELIOS | {
        "has_multi_term_memory_patch": False,
        "guidance_cross_attn": False,
        "zero_history_timestep": False,
    }
    return build("HeliosTransformer3DModel", **config), {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": torch.arange(grid[0]).repeat(batch, 1),
        "return_dict": False,
    }


@case(
    "HeliosTransformer3DModel",
    dense=2,
    others=2,
    kind="joint",
    before=6 + 15,
    frames=1,
    grids=((3, 6, 10),),
    note="history comes first: two coarser grids stay exact, a frame of the same grid joins it",
)
def helios_history(grid: Grid, batch: int) -> Made:
    model = build("HeliosTransformer3DModel", **HELIOS, has_multi_term_memory_patch=True)
    inputs: dict[str, Any] = {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": torch.arange(grid[0]).repeat(batch, 1),
        "return_dict": False,
    }
    for name, count in (("short", 1), ("mid", 2), ("long", 4)):
        history = latents((count, *grid[1:]), batch)
        inputs[f"latents_history_{name}"] = history
        inputs[f"indices_latents_history_{name}"] = torch.arange(count).repeat(batch, 1)
    return model, inputs
