"""Real video transformers, small and with random weights, and what their graphs should show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from refilled import refilled
from torch import Tensor, nn

Grid = tuple[int, int, int]


def wan() -> nn.Module:
    models = pytest.importorskip("diffusers")
    return refilled(
        lambda: models.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )


def wan_inputs(grid: Grid, batch: int, text: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "return_dict": False,
    }


def hunyuan() -> nn.Module:
    models = pytest.importorskip("diffusers")
    return refilled(
        lambda: models.HunyuanVideoTransformer3DModel(
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
    )


def hunyuan_inputs(grid: Grid, batch: int, text: int) -> dict[str, Any]:
    t, h, w = grid
    mask = torch.ones(batch, text, dtype=torch.int64)
    mask[0, text - 3 :] = 0
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def cogvideox() -> nn.Module:
    models = pytest.importorskip("diffusers")
    return refilled(
        lambda: models.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=7,
            use_rotary_positional_embeddings=True,
        )
    )


def cogvideox_inputs(grid: Grid, batch: int, text: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, t, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "image_rotary_emb": (torch.randn(t * h * w, 8), torch.randn(t * h * w, 8)),
        "return_dict": False,
    }


def video_dit() -> nn.Module:
    from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

    config = VideoDiTConfig(width=32, layers=2, heads=2, mlp_width=32, rope_axes=(4, 6, 6))
    return refilled(lambda: VideoDiT(config))


def video_dit_inputs(grid: Grid, batch: int, text: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "video": torch.randn(batch, 3, t, 4 * h, 4 * w),
        "timestep": torch.full((batch,), 0.5),
    }


@dataclass(frozen=True)
class Case:
    """A model and the sites it should show: name, kind, and on which side the text is."""

    make: Callable[[], nn.Module]
    inputs: Callable[[Grid, int, int], dict[str, Any]]
    sites: tuple[tuple[str, str, str], ...]


CASES = {
    "wan": Case(
        wan,
        wan_inputs,
        (
            ("blocks.0.attn1", "self", ""),
            ("blocks.0.attn2", "cross", ""),
            ("blocks.1.attn1", "self", ""),
            ("blocks.1.attn2", "cross", ""),
        ),
    ),
    "hunyuan": Case(
        hunyuan,
        hunyuan_inputs,
        (
            ("context_embedder.token_refiner.refiner_blocks.0.attn", "text", ""),
            ("transformer_blocks.0.attn", "joint", "after"),
            ("single_transformer_blocks.0.attn", "joint", "after"),
        ),
    ),
    "cogvideox": Case(
        cogvideox,
        cogvideox_inputs,
        (
            ("transformer_blocks.0.attn1", "joint", "before"),
            ("transformer_blocks.1.attn1", "joint", "before"),
        ),
    ),
    "video_dit": Case(
        video_dit,
        video_dit_inputs,
        (("blocks.0.attn", "self", ""), ("blocks.1.attn", "self", "")),
    ),
}


def output(result: Any) -> Tensor:
    """The tensor that a model returns, alone or first of a tuple."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found
