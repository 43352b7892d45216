"""Classes that were tried last: audio, masked tokens, motion modules, vision towers of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import Grid, Made, build, case, image, latents, refilled, text
from model_cases_encoder import LIBRARY, SMALL, encoder

SQUARE: tuple[Grid, ...] = ((1, 16, 16), (1, 18, 18))
AUDIO: tuple[Grid, ...] = ((1, 1, 300), (1, 1, 240))


def inner(name: str, /, **config: Any) -> torch.nn.Module:
    """A model that diffusers has, but does not list among its own."""
    models = pytest.importorskip("diffusers.models")
    return refilled(getattr(models, name)(**config))


@case(
    "AnyFlowFARTransformer3DModel", dense=0, others=4, source="", grids=((3, 6, 10),),
    note="chunks of frames see the earlier ones: FlexAttention with a block mask",
)  # fmt: skip
def anyflow_far(grid: Grid, batch: int) -> Made:
    model = build(
        "AnyFlowFARTransformer3DModel", patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3, num_attention_heads=2, attention_head_dim=24, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
        chunk_partition=(1, 2),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(grid, batch).transpose(1, 2).contiguous(),
        "timestep": torch.full((batch, grid[0]), 500.0),
        "r_timestep": torch.full((batch, grid[0]), 400.0),
        "encoder_hidden_states": text(batch),
        "chunk_partition": [1, grid[0] - 1],
        "return_dict": False,
    }


@case("UVit2DModel", dense=2, others=6, image=True, note="a U-Net of tokens of a codebook")
def uvit(grid: Grid, batch: int) -> Made:
    model = inner(
        "UVit2DModel", hidden_size=32, cond_embed_dim=16, micro_cond_encode_dim=8,
        micro_cond_embed_dim=40, encoder_hidden_size=16, vocab_size=40, codebook_size=32,
        in_channels=32, block_out_channels=32, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, sample_size=16,
    )  # fmt: skip
    return model, {
        "input_ids": torch.randint(0, 32, (batch, *grid[1:])),
        "encoder_hidden_states": text(batch),
        "pooled_text_emb": torch.randn(batch, 16),
        "micro_conds": torch.rand(batch, 5),
    }


@case("AceStepTransformer1DModel", dense=1, others=3, source="given", grids=AUDIO,
      note="audio, grouped heads; every other layer sees a window only")  # fmt: skip
def ace_step(grid: Grid, batch: int) -> Made:
    model = build(
        "AceStepTransformer1DModel", hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, in_channels=12,
        audio_acoustic_hidden_dim=4, patch_size=2, sliding_window=16, encoder_hidden_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 2 * grid[2], 4),
        "timestep": torch.rand(batch),
        "timestep_r": torch.rand(batch),
        "encoder_hidden_states": text(batch),
        "context_latents": torch.randn(batch, 2 * grid[2], 8),
        "return_dict": False,
    }


@case("StableAudio3DiTModel", dense=4, others=4, kind="joint", before=4, source="given",
      grids=AUDIO, note="audio; the difference of two attentions, tokens of memory in front",
)  # fmt: skip
def stable_audio3(grid: Grid, batch: int) -> Made:
    model = inner(
        "StableAudio3DiTModel", io_channels=4, embed_dim=32, depth=2, num_heads=2,
        cond_token_dim=16, global_cond_dim=16, local_add_cond_dim=5, timestep_features_dim=16,
        num_memory_tokens=4, use_differential_attention=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, grid[2]),
        "timestep": torch.rand(batch),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": torch.randn(batch, 16),
        "local_add_cond": torch.randn(batch, 5, grid[2]),
        "return_dict": False,
    }


@case("LongCatAudioDiTTransformer", dense=2, others=2, source="given", grids=AUDIO, note="audio")
def longcat_audio(grid: Grid, batch: int) -> Made:
    model = inner(
        "LongCatAudioDiTTransformer", dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16,
        latent_dim=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, grid[2], 4),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, 7, dtype=torch.bool),
        "timestep": torch.rand(batch),
        "latent_cond": torch.randn(batch, grid[2], 4),
        "return_dict": False,
    }


@case("UNetMotionModel", dense=0, others=22, source="", grids=((3, 16, 20),), batches=(1,),
      note="attends within frames and across them")  # fmt: skip
def unet_motion(grid: Grid, batch: int) -> Made:
    model = build(
        "UNetMotionModel", sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), norm_num_groups=4,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=16,
        num_attention_heads=2, motion_num_attention_heads=2,
    )  # fmt: skip
    return model, {
        "sample": latents(grid, batch, 4, (1, 1, 1)),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text(grid[0]),
        "return_dict": False,
    }


@case("AutoencoderKLWan", dense=2, grids=((1, 16, 20),), note="one frame; one head in its middle")
def wan_autoencoder(grid: Grid, batch: int) -> Made:
    model = build(
        "AutoencoderKLWan", base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
        temperal_downsample=[False],
    )  # fmt: skip
    return model, {"sample": latents(grid, batch, 3, (1, 2, 2)), "return_dict": False}


@case("DreamLiteTransformer2DModel", dense=1, others=1, image=True)
def dreamlite(grid: Grid, batch: int) -> Made:
    model = build(
        "DreamLiteTransformer2DModel", num_attention_heads=2, attention_head_dim=16,
        in_channels=16, num_layers=1, norm_num_groups=4, cross_attention_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch, 16, 1),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("Aimv2VisionModel", LIBRARY, dense=2, others=1, grids=SQUARE)
def aimv2(grid: Grid, batch: int) -> Made:
    config = SMALL | {"intermediate_size": 32, "patch_size": 2, "image_size": 2 * grid[1]}
    model = encoder("Aimv2VisionModel", "Aimv2VisionConfig", **config)
    return model, {"pixel_values": image(grid, batch, 3)}


@case(
    "XCLIPVisionModel", LIBRARY, dense=2, others=2, kind="joint", before=1, after=1,
    grids=((1, 16, 16),), batches=(4,),
    note="a class token before and a message after each frame's; messages attend in time",
)  # fmt: skip
def xclip(grid: Grid, batch: int) -> Made:
    model = encoder(
        "XCLIPVisionModel", "XCLIPVisionConfig", **SMALL, intermediate_size=32, patch_size=2,
        image_size=2 * grid[1], num_frames=batch, mit_hidden_size=16, mit_intermediate_size=16,
        mit_num_attention_heads=2,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("SamVisionModel", LIBRARY, dense=0, others=2, source="", grids=((1, 16, 16),),
      note="a bias per pair, from queries and relative positions")  # fmt: skip
def sam(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SamVisionModel", "SamVisionConfig", **SMALL, mlp_dim=32, output_channels=16, patch_size=2,
        image_size=2 * grid[1], window_size=4, global_attn_indexes=[1],
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("SwinModel", LIBRARY, dense=0, others=3, source="", grids=((1, 16, 16),),
      note="windows, shifted ones too")  # fmt: skip
def swin_shifted(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SwinModel", "SwinConfig", embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4,
        patch_size=2, image_size=2 * grid[1],
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("PvtV2Model", LIBRARY, dense=1, others=1, grids=((1, 16, 20),),
      note="the other has fewer keys than queries")  # fmt: skip
def pvt(grid: Grid, batch: int) -> Made:
    model = encoder(
        "PvtV2Model", "PvtV2Config", hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2,
        sr_ratios=[2, 1], num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2],
        mlp_ratios=[2, 2], image_size=64,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3, 4)}


@case("DPTModel", LIBRARY, dense=2, kind="joint", before=1, grids=SQUARE, note="class token")
def dpt(grid: Grid, batch: int) -> Made:
    model = encoder(
        "DPTModel", "DPTConfig", **SMALL, intermediate_size=32, patch_size=2,
        image_size=2 * grid[1], backbone_out_indices=[0, 1], neck_hidden_sizes=[8, 8],
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("ModernBertModel", LIBRARY, dense=1, others=1, source="given", grids=AUDIO,
      note="text; every other layer sees a window only")  # fmt: skip
def modern_bert(grid: Grid, batch: int) -> Made:
    model = encoder(
        "ModernBertModel", "ModernBertConfig", **SMALL, intermediate_size=32, vocab_size=50,
        pad_token_id=0, global_attn_every_n_layers=2, local_attention=32, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return model, {"input_ids": torch.randint(3, 50, (batch, grid[2]))}


@case("LlamaModel", LIBRARY, dense=0, others=2, source="", grids=AUDIO, note="causal, with a cache")
def llama(grid: Grid, batch: int) -> Made:
    model = encoder(
        "LlamaModel", "LlamaConfig", **SMALL, intermediate_size=32, vocab_size=50,
        num_key_value_heads=1,
    )  # fmt: skip
    return model, {"input_ids": torch.randint(0, 50, (batch, grid[2]))}


@case("Wav2Vec2ConformerModel", LIBRARY, dense=2, source="given", grids=((1, 1, 300),),
      note="audio")  # fmt: skip
def conformer(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **SMALL, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(4, 2), conv_kernel=(4, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        position_embeddings_type="rotary",
    )  # fmt: skip
    return model, {"input_values": torch.randn(batch, 8 * grid[2])}
