"""Encoders of transformers: video, images, audio and text."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import Grid, Made, build, case, image

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LIBRARY = "transformers"


def encoder(name: str, config: str, /, **values: Any) -> torch.nn.Module:
    """A model with random weights."""
    import pytest

    library = pytest.importorskip(LIBRARY)
    return build(name, LIBRARY, config=getattr(library, config)(**values))


def frames(grid: Grid, batch: int, tubelet: int = 2) -> torch.Tensor:
    """(B, T, 3, H, W) with patches of 2 x 2."""
    return torch.randn(batch, grid[0] * tubelet, 3, 2 * grid[1], 2 * grid[2])


SQUARE: tuple[Grid, ...] = ((3, 8, 8), (5, 7, 7), (1, 18, 18))


@case("VideoMAEModel", LIBRARY, dense=2, grids=SQUARE)
def videomae(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VideoMAEModel", "VideoMAEConfig", **SMALL, image_size=2 * grid[1], patch_size=2,
        num_frames=2 * grid[0], tubelet_size=2, intermediate_size=32,
    )  # fmt: skip
    return model, {"pixel_values": frames(grid, batch)}


@case("VideoMAEModel", LIBRARY, dense=2, grids=SQUARE, note="attention written out (eager)")
def videomae_eager(grid: Grid, batch: int) -> Made:
    model, inputs = videomae(grid, batch)
    model.set_attn_implementation("eager")
    return model, inputs


@case("VJEPA2Model", LIBRARY, dense=2, grids=SQUARE, note="encoder")
def vjepa2(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VJEPA2Model", "VJEPA2Config", **(SMALL | {"hidden_size": 48}), patch_size=2,
        crop_size=2 * grid[1], frames_per_clip=2 * grid[0], tubelet_size=2, mlp_ratio=1,
        pred_hidden_size=48, pred_num_attention_heads=2, pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )  # fmt: skip
    return model, {"pixel_values_videos": frames(grid, batch), "skip_predictor": True}


@case(
    "TimesformerModel", LIBRARY, dense=0, others=4, source="", grids=SQUARE[:2],
    note="attends in time, then in space",
)  # fmt: skip
def timesformer(grid: Grid, batch: int) -> Made:
    model = encoder(
        "TimesformerModel", "TimesformerConfig", **SMALL, image_size=2 * grid[1], patch_size=2,
        num_frames=grid[0], intermediate_size=32,
    )  # fmt: skip
    return model, {"pixel_values": frames(grid, batch, 1)}


@case(
    "TimesformerModel", LIBRARY, dense=2, before=1, kind="joint", grids=SQUARE[:2], order=(1, 2, 0),
    note="joint attention in time and space, time fastest; a class token in front",
)  # fmt: skip
def timesformer_joint(grid: Grid, batch: int) -> Made:
    t, h, _ = grid
    model = encoder(
        "TimesformerModel", "TimesformerConfig", **SMALL, image_size=2 * h, patch_size=2,
        num_frames=t, intermediate_size=32, attention_type="joint_space_time",
    )  # fmt: skip
    return model, {"pixel_values": frames(grid, batch, 1)}


@case("VivitModel", LIBRARY, dense=2, kind="joint", before=1, grids=SQUARE, note="class token")
def vivit(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VivitModel", "VivitConfig", **SMALL, image_size=2 * grid[1], num_frames=2 * grid[0],
        tubelet_size=[2, 2, 2], intermediate_size=32,
    )  # fmt: skip
    return model, {"pixel_values": frames(grid, batch)}


@case("ViTModel", LIBRARY, dense=2, kind="joint", before=1, image=True, note="class token")
def vit(grid: Grid, batch: int) -> Made:
    model = encoder(
        "ViTModel", "ViTConfig", **SMALL, image_size=(2 * grid[1], 2 * grid[2]), patch_size=2,
        intermediate_size=32,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("Dinov2Model", LIBRARY, dense=2, kind="joint", before=1, image=True, note="class token")
def dinov2(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Dinov2Model", "Dinov2Config", **SMALL, image_size=2 * grid[1], patch_size=2, mlp_ratio=1
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@case(
    "Dinov2WithRegistersModel", LIBRARY, dense=2, kind="joint", before=5, image=True,
    note="class token and registers",
)  # fmt: skip
def dinov2_registers(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SMALL, image_size=2 * grid[1],
        patch_size=2, mlp_ratio=1, num_register_tokens=4,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case(
    "CLIPVisionModel", LIBRARY, dense=2, kind="joint", before=1, image=True,
    grids=((1, 18, 18), (1, 16, 16)), note="class token",
)  # fmt: skip
def clip_vision(grid: Grid, batch: int) -> Made:
    model = encoder(
        "CLIPVisionModel", "CLIPVisionConfig", **SMALL, image_size=2 * grid[1], patch_size=2,
        intermediate_size=32,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case("CLIPTextModel", LIBRARY, dense=0, others=2, source="", note="causal")
def clip_text(grid: Grid, batch: int) -> Made:
    model = encoder(
        "CLIPTextModel", "CLIPTextConfig", **SMALL, intermediate_size=32, vocab_size=99,
        max_position_embeddings=64,
    )  # fmt: skip
    return model, {"input_ids": torch.randint(0, 99, (batch, 40))}


LINE: tuple[Grid, ...] = ((1, 1, 300), (1, 1, 240))


@case("BertModel", LIBRARY, dense=2, source="given", grids=LINE, note="text")
def bert(grid: Grid, batch: int) -> Made:
    model = encoder(
        "BertModel", "BertConfig", **SMALL, intermediate_size=32, vocab_size=99,
        max_position_embeddings=512,
    )  # fmt: skip
    return model, {"input_ids": torch.randint(0, 99, (batch, grid[2]))}


@case("T5EncoderModel", LIBRARY, dense=0, others=2, source="", note="text, scores with a bias")
def t5(grid: Grid, batch: int) -> Made:
    model = encoder(
        "T5EncoderModel", "T5Config", d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        vocab_size=99,
    )  # fmt: skip
    return model, {"input_ids": torch.randint(0, 99, (batch, 40))}


@case("WhisperModel", LIBRARY, dense=2, source="given", grids=LINE, note="audio encoder")
def whisper(grid: Grid, batch: int) -> Made:
    model = encoder(
        "WhisperModel", "WhisperConfig", d_model=32, encoder_layers=2, encoder_attention_heads=2,
        decoder_layers=1, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_mel_bins=8, max_source_positions=grid[2], vocab_size=99, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return model.get_encoder(), {"input_features": torch.randn(batch, 8, 2 * grid[2])}


@case("Wav2Vec2Model", LIBRARY, dense=2, source="given", grids=LINE, note="audio")
def wav2vec2(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Wav2Vec2Model", "Wav2Vec2Config", **SMALL, intermediate_size=32, conv_dim=(16, 16),
        conv_stride=(4, 2), conv_kernel=(4, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return model, {"input_values": torch.randn(batch, 8 * grid[2])}


@case(
    "WhisperModel", LIBRARY, dense=2, source="given", grids=LINE,
    note="audio encoder, attention written out (eager)",
)  # fmt: skip
def whisper_eager(grid: Grid, batch: int) -> Made:
    model, inputs = whisper(grid, batch)
    model.set_attn_implementation("eager")
    return model, inputs


@case("SiglipVisionModel", LIBRARY, dense=2, others=1, image=True, grids=((1, 18, 18),))
def siglip(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SiglipVisionModel", "SiglipVisionConfig", **SMALL, image_size=2 * grid[1], patch_size=2,
        intermediate_size=32,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}


@case(
    "Swinv2Model", LIBRARY, dense=0, others=1, source="", grids=((1, 16, 16),),
    note="cosine scores with a learned temperature, in windows",
)  # fmt: skip
def swin(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Swinv2Model", "Swinv2Config", image_size=32, patch_size=2, embed_dim=16, depths=[2],
        num_heads=[2], window_size=4,
    )  # fmt: skip
    return model, {"pixel_values": image(grid, batch, 3)}
