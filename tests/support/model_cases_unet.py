"""Attention inside U-Nets and autoencoders of diffusers."""

from __future__ import annotations

import torch
from model_cases import Grid, Made, build, case, image, latents, text


@case("Transformer2DModel", dense=1, others=1, image=True, note="as in U-Nets")
def transformer_2d(grid: Grid, batch: int) -> Made:
    model = build(
        "Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    return model, {
        "hidden_states": image(grid, batch, 16, 1),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("DreamLiteTransformer2DModel", dense=1, others=1, image=True)
def dreamlite(grid: Grid, batch: int) -> Made:
    model = build(
        "DreamLiteTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    return model, {
        "hidden_states": image(grid, batch, 16, 1),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case(
    "UNetSpatioTemporalConditionModel",
    dense=0,
    others=16,
    source="",
    grids=((3, 8, 12),),
    note="attends within frames and across them",
)
def unet_spatio_temporal(grid: Grid, batch: int) -> Made:
    model = build(
        "UNetSpatioTemporalConditionModel",
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=grid[0],
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    return model, {
        "sample": latents(grid, batch, patch=(1, 1, 1)).transpose(1, 2).contiguous(),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": text(batch, 16, 1),
        "added_time_ids": torch.ones(batch, 3),
        "return_dict": False,
    }


@case(
    "UNetMotionModel",
    dense=0,
    others=22,
    source="",
    grids=((3, 16, 20),),
    batches=(1,),
    note="attends within frames and across them",
)
def unet_motion(grid: Grid, batch: int) -> Made:
    model = build(
        "UNetMotionModel",
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        norm_num_groups=4,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    return model, {
        "sample": latents(grid, batch, 4, (1, 1, 1)),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text(grid[0]),
        "return_dict": False,
    }


@case("AutoencoderKL", dense=2, image=True, note="one head in its middle")
def autoencoder(grid: Grid, batch: int) -> Made:
    model = build(
        "AutoencoderKL",
        block_out_channels=(16,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        sample_size=32,
        latent_channels=4,
    )
    return model, {"sample": image(grid, batch, 3, 1), "return_dict": False}


@case("AutoencoderKLWan", dense=2, grids=((1, 16, 20),), note="one frame; one head in its middle")
def wan_autoencoder(grid: Grid, batch: int) -> Made:
    model = build(
        "AutoencoderKLWan",
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
    )
    return model, {"sample": latents(grid, batch, 3, (1, 2, 2)), "return_dict": False}
