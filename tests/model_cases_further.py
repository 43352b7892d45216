"""Classes and settings that came later: reference images, single streams, autoencoders, U-Nets."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TEXT, Grid, Made, build, case, image, latents, positions, steps, text
from model_cases_encoder import LIBRARY, SMALL, encoder
from model_cases_packed import packed
from model_cases_video import WAN, wan_inputs

WIDE: tuple[Grid, ...] = ((1, 14, 22), (1, 15, 21), (1, 16, 20))
SQUARE: tuple[Grid, ...] = ((1, 16, 16), (1, 18, 18))


@case("WanTransformer3DModel", dense=2, others=2, note="patches of 1 x 3 x 3")
def wan_patch3(grid: Grid, batch: int) -> Made:
    model = build("WanTransformer3DModel", **(WAN | {"patch_size": (1, 3, 3)}))
    return model, wan_inputs(grid, batch) | {
        "hidden_states": latents(grid, batch, patch=(1, 3, 3)),
    }


@case("Krea2Transformer2DModel", dense=2, others=2, kind="joint", before=TEXT, source="given",
      image=True, note="grouped heads")  # fmt: skip
def krea2(grid: Grid, batch: int) -> Made:
    model = build(
        "Krea2Transformer2DModel", in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=16,
        text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": packed(grid, batch),
        "encoder_hidden_states": torch.randn(batch, TEXT, 2, 16),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions(grid)]),
        "return_dict": False,
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


FLUX3 = {
    "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
    "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip


@case(
    "Flux3Transformer2DModel", dense=3, others=1, source="given", image=True,
    each=(("self", 0, 0), ("joint", TEXT, 0), ("joint", TEXT, 0)),
    note="image and text alone first, then together",
)  # fmt: skip
def flux3(grid: Grid, batch: int) -> Made:
    return build("Flux3Transformer2DModel", **FLUX3), flux3_inputs(grid, batch)


@case(
    "Flux3Transformer2DModel", dense=3, others=2, source="given", image=True,
    each=(("self", 0, 0), ("joint", TEXT, 80), ("joint", TEXT, 80)),
    note="a reference image of 80 tokens comes last and stays exact",
)  # fmt: skip
def flux3_reference(grid: Grid, batch: int) -> Made:
    return build("Flux3Transformer2DModel", **FLUX3), flux3_inputs(grid, batch) | {
        "image_cond_hidden_states": torch.randn(batch, 80, 4),
        "image_cond_ids": torch.zeros(80, 4),
    }


@case(
    "JoyImageEditPlusTransformer3DModel", dense=2, kind="joint", after=TEXT, source="given",
    note="the mask is filled item by item of the batch",
)  # fmt: skip
def joyimage_plus(grid: Grid, batch: int) -> Made:
    model = build(
        "JoyImageEditPlusTransformer3DModel", patch_size=[1, 2, 2], in_channels=4, hidden_size=32,
        num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 6, 6],
    )  # fmt: skip
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


FIBO2 = {
    "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
    "cap_feat_dim": 16, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
    "min_num_gist_tokens": 8, "max_num_gist_tokens": 16, "gist_step": 4, "gist_min_text_len": 4,
    "gist_max_text_len": 32, "axes_dims": (4, 6, 6), "axes_lens": (64, 64, 64),
}  # fmt: skip


@case(
    "BriaFibo2Transformer2DModel", dense=3, others=3, image=True,
    each=(("self", 0, 0), ("joint", 12, 0), ("joint", 12, 0)),
    note="text becomes 12 tokens, which come first",
)  # fmt: skip
def bria_fibo2(grid: Grid, batch: int) -> Made:
    return build("BriaFibo2Transformer2DModel", **FIBO2), {
        "hidden_states": image(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 2, TEXT, 16),
        "return_dict": False,
    }


@case(
    "BriaFibo2Transformer2DModel", dense=3, others=3, image=True,
    each=(("joint", 0, 48), ("joint", 12, 48), ("joint", 12, 48)),
    note="an image to edit, on a grid of its own, comes last and stays exact",
)  # fmt: skip
def bria_fibo2_edit(grid: Grid, batch: int) -> Made:
    model, inputs = bria_fibo2(grid, batch)
    return model, inputs | {"context_latents": [image((1, 6, 8), batch)]}


@case(
    "HunyuanImageTransformer2DModel", dense=2, others=1, kind="joint", after=TEXT, image=True,
    note="guidance",
)  # fmt: skip
def hunyuan_image(grid: Grid, batch: int) -> Made:
    model = build(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=(1, 1), text_embed_dim=16, rope_axes_dim=(8, 8), guidance_embeds=True,
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch, 4, 1),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.int64),
        "guidance": torch.full((batch,), 3.0),
        "return_dict": False,
    }


@case(
    "MiniMaxMusic3Transformer1DModel", dense=2, kind="joint", before=1, source="given",
    grids=((1, 1, 300), (1, 1, 240)), note="audio; the time step is a token in front",
)  # fmt: skip
def minimax_music(grid: Grid, batch: int) -> Made:
    model = build(
        "MiniMaxMusic3Transformer1DModel", in_channels=4, condition_dim=16, num_layers=2,
        num_attention_heads=2, attention_head_dim=16, ff_inner_dim=32, rotary_dim=8,
        fourier_embedding_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, grid[2]),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, grid[2], 16),
        "return_dict": False,
    }


@case(
    "MiniMaxH3Transformer3DModel", dense=2, others=1, kind="joint", before=TEXT, after=5,
    source="given", note="text, video and audio are put in place by index, as they are written",
)  # fmt: skip
def minimax_h3(grid: Grid, batch: int) -> Made:
    model = build(
        "MiniMaxH3Transformer3DModel", num_attention_heads=2, attention_head_dim=24,
        hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32, in_channels=4,
        audio_in_channels=4, text_dim=16, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=16,
        rope_freq_dim=4,
    )  # fmt: skip
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


@case(
    "SD3Transformer2DModel", dense=3, image=True,
    each=(("joint", 0, TEXT), ("self", 0, 0), ("joint", 0, TEXT)),
    note="3.5: the image attends to itself besides",
)  # fmt: skip
def sd35(grid: Grid, batch: int) -> Made:
    model = build(
        "SD3Transformer2DModel", sample_size=64, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=40, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch),
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": steps(batch),
        "return_dict": False,
    }


@case("Transformer2DModel", dense=1, others=1, image=True, note="as in U-Nets")
def transformer_2d(grid: Grid, batch: int) -> Made:
    model = build(
        "Transformer2DModel", num_attention_heads=2, attention_head_dim=16, in_channels=16,
        num_layers=1, norm_num_groups=4, cross_attention_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch, 16, 1),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("AutoencoderKL", dense=2, image=True, note="one head in its middle")
def autoencoder(grid: Grid, batch: int) -> Made:
    model = build(
        "AutoencoderKL", block_out_channels=(16,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=4, sample_size=32, latent_channels=4,
    )  # fmt: skip
    return model, {"sample": image(grid, batch, 3, 1), "return_dict": False}


@case(
    "UNetSpatioTemporalConditionModel", dense=0, others=16, source="", grids=((3, 8, 12),),
    note="attends within frames and across them",
)  # fmt: skip
def unet_spatio_temporal(grid: Grid, batch: int) -> Made:
    model = build(
        "UNetSpatioTemporalConditionModel", sample_size=32, in_channels=4, out_channels=4,
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
        num_attention_heads=(2, 4), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, num_frames=grid[0],
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    return model, {
        "sample": latents(grid, batch, patch=(1, 1, 1)).transpose(1, 2).contiguous(),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": text(batch, 16, 1),
        "added_time_ids": torch.ones(batch, 3),
        "return_dict": False,
    }


@case("DINOv3ViTModel", LIBRARY, dense=2, kind="joint", before=4, image=True,
      note="class token and registers, rotary positions")  # fmt: skip
def dinov3(grid: Grid, batch: int) -> Made:
    config = SMALL | {"intermediate_size": 32, "patch_size": 2, "num_register_tokens": 3}
    model = encoder("DINOv3ViTModel", "DINOv3ViTConfig", **config)
    return model, {"pixel_values": image(grid, batch, 3)}


@case("IJepaModel", LIBRARY, dense=2, grids=SQUARE)
def ijepa(grid: Grid, batch: int) -> Made:
    config = SMALL | {"intermediate_size": 32, "patch_size": 2, "image_size": 2 * grid[1]}
    return encoder("IJepaModel", "IJepaConfig", **config), {"pixel_values": image(grid, batch, 3)}


@case("YolosModel", LIBRARY, dense=2, kind="joint", before=1, after=5, grids=WIDE,
      note="class token before, detection tokens after")  # fmt: skip
def yolos(grid: Grid, batch: int) -> Made:
    model = encoder(
        "YolosModel", "YolosConfig", **SMALL, intermediate_size=32, patch_size=2,
        image_size=[2 * grid[1], 2 * grid[2]], num_detection_tokens=5,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("ASTModel", LIBRARY, dense=2, kind="joint", before=2, grids=WIDE,
      note="audio: a spectrogram as an image")  # fmt: skip
def spectrogram(grid: Grid, batch: int) -> Made:
    model = encoder(
        "ASTModel", "ASTConfig", **SMALL, intermediate_size=32, patch_size=2, frequency_stride=2,
        time_stride=2, max_length=2 * grid[2], num_mel_bins=2 * grid[1],
    )  # fmt: skip
    return model, {"input_values": torch.randn(batch, 2 * grid[2], 2 * grid[1])}


@case("VitDetModel", LIBRARY, dense=1, others=1, grids=((1, 16, 16),),
      note="the other attends within windows")  # fmt: skip
def vitdet(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VitDetModel", "VitDetConfig", **SMALL, patch_size=2, image_size=2 * grid[1],
        window_block_indices=[0], window_size=4,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("SegformerModel", LIBRARY, dense=1, others=1, grids=((1, 16, 20),),
      note="the other has fewer keys than queries")  # fmt: skip
def segformer(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SegformerModel", "SegformerConfig", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
        hidden_sizes=[16, 32], num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2],
        mlp_ratios=[2, 2],
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3, 4)}


@case("BeitModel", LIBRARY, dense=0, others=2, source="", grids=((1, 16, 16),),
      note="a learned bias per pair")  # fmt: skip
def beit_bias(grid: Grid, batch: int) -> Made:
    model = encoder(
        "BeitModel", "BeitConfig", **SMALL, intermediate_size=32, patch_size=2,
        image_size=2 * grid[1], use_relative_position_bias=True,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("HubertModel", LIBRARY, dense=2, source="given", grids=((1, 1, 300),), note="audio")
def hubert(grid: Grid, batch: int) -> Made:
    model = encoder(
        "HubertModel", "HubertConfig", **SMALL, intermediate_size=32, conv_dim=(16, 16),
        conv_stride=(4, 2), conv_kernel=(4, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return model, {"input_values": torch.randn(batch, 8 * grid[2])}
