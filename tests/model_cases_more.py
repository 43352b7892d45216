"""Further models of diffusers: history frames, three streams, grouped heads, audio."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TEXT, Grid, Made, build, case, image, latents, positions, steps, text
from model_cases_packed import FLUX, flux_inputs, packed
from model_cases_video import WAN


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


HELIOS = {key: WAN[key] for key in WAN if key not in ("rope_max_seq_len",)} | {
    "rope_dim": (4, 6, 6),
    "cross_attn_norm": True,
}


@case("HeliosTransformer3DModel", dense=2, others=2, note="without history frames")
def helios(grid: Grid, batch: int) -> Made:
    config = HELIOS | {"has_multi_term_memory_patch": False, "guidance_cross_attn": False,
                       "zero_history_timestep": False}  # fmt: skip
    return build("HeliosTransformer3DModel", **config), {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": torch.arange(grid[0]).repeat(batch, 1),
        "return_dict": False,
    }


@case(
    "HeliosTransformer3DModel", dense=2, others=2, kind="joint", before=6 + 15, frames=1,
    grids=((3, 6, 10),),
    note="history comes first: two coarser grids stay exact, a frame of the same grid joins it",
)  # fmt: skip
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


@case("JoyImageEditTransformer3DModel", dense=2, kind="joint", after=TEXT)
def joyimage(grid: Grid, batch: int) -> Made:
    model = build(
        "JoyImageEditTransformer3DModel", patch_size=[1, 2, 2], in_channels=4, hidden_size=32,
        num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("CogView3PlusTransformer2DModel", dense=2, kind="joint", before=TEXT, image=True)
def cogview3plus(grid: Grid, batch: int) -> Made:
    model = build(
        "CogView3PlusTransformer2DModel", patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=16,
        time_embed_dim=8, condition_dim=2, pos_embed_max_size=32, sample_size=16,
    )  # fmt: skip
    size = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
    return model, {
        "hidden_states": image(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
        "return_dict": False,
    }


@case("ErnieImageTransformer2DModel", dense=2, kind="joint", after=TEXT, image=True)
def ernie(grid: Grid, batch: int) -> Made:
    model = build(
        "ErnieImageTransformer2DModel", hidden_size=32, num_attention_heads=2, num_layers=2,
        ffn_hidden_size=32, in_channels=4, out_channels=4, patch_size=1, text_in_dim=16,
        rope_theta=256, rope_axes_dim=(8, 4, 4), qk_layernorm=True,
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch, patch=1),
        "timestep": torch.ones(batch),
        "text_bth": text(batch),
        "text_lens": torch.full((batch,), TEXT),
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


@case("GlmImageTransformer2DModel", dense=2, kind="joint", before=TEXT, image=True, fullgraph=True)
def glm_image(grid: Grid, batch: int) -> Made:
    model = build(
        "GlmImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, text_embed_dim=16, time_embed_dim=8,
        condition_dim=4, prior_vq_quantizer_codebook_size=64,
    )  # fmt: skip
    tokens = grid[1] * grid[2]
    return model, {
        "hidden_states": image(grid, batch),
        "encoder_hidden_states": text(batch),
        "prior_token_id": torch.zeros(batch, tokens, dtype=torch.int64),
        "prior_token_drop": torch.zeros(batch, tokens, dtype=torch.bool),
        "timestep": steps(batch),
        "target_size": torch.full((batch, 2), 64.0),
        "crop_coords": torch.zeros(batch, 2),
        "return_dict": False,
    }


@case(
    "NucleusMoEImageTransformer2DModel", dense=2, kind="text in keys", after=TEXT, source="given",
    image=True, note="image queries, text in the keys only",
)  # fmt: skip
def nucleus(grid: Grid, batch: int) -> Made:
    model = build(
        "NucleusMoEImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4,
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0, 8.0],
    )  # fmt: skip
    return model, {
        "hidden_states": packed(grid, batch, 16),
        "encoder_hidden_states": text(batch),
        "timestep": torch.ones(batch),
        "img_shapes": [grid] * batch,
        "return_dict": False,
    }


@case(
    "StableAudioDiTModel", dense=2, others=2, kind="joint", before=1, source="given",
    grids=((1, 1, 300), (1, 1, 240)), note="audio, grouped heads, one global token in front",
)  # fmt: skip
def stable_audio(grid: Grid, batch: int) -> Made:
    model = build(
        "StableAudioDiTModel", sample_size=grid[2], in_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, num_key_value_attention_heads=2,
        out_channels=4, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=8,
        cross_attention_input_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, grid[2]),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": torch.randn(batch, 1, 8),
        "rotary_embedding": (torch.randn(grid[2] + 1, 4), torch.randn(grid[2] + 1, 4)),
        "return_dict": False,
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
        "WanAnimateTransformer3DModel", **(WAN | {"in_channels": 12}), latent_channels=4,
        image_dim=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16,
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(grid, batch, 12),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_image": text(batch, 16, 12),
        "pose_hidden_states": latents((grid[0] - 1, *grid[1:]), batch),
        "face_pixel_values": torch.randn(batch, 3, 77, 16, 16),
        "return_dict": False,
    }


@case(
    "PRXTransformer2DModel", dense=2, kind="text in keys", before=TEXT, grids=((1, 16, 20),),
    note="image queries, text in the keys only",
)  # fmt: skip
def prx(grid: Grid, batch: int) -> Made:
    model = build(
        "PRXTransformer2DModel", in_channels=4, patch_size=2, context_in_dim=16, hidden_size=32,
        mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case(
    "Cosmos3OmniTransformer", dense=2, others=2, kind="text in keys", before=TEXT, source="given",
    batches=(1,),
    note="video queries, text in the keys only; the text's own attention is causal",
)  # fmt: skip
def cosmos3(grid: Grid, batch: int) -> Made:
    model = build(
        "Cosmos3OmniTransformer", head_dim=12, hidden_act="relu2", hidden_size=24,
        intermediate_size=24, latent_channel=2, latent_patch_size=1, num_attention_heads=2,
        num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=2, qk_norm_for_text=False,
        rms_norm_eps=1e-5, rope_axes_dim=[2, 2, 2], rope_theta=1e8, vocab_size=32,
    )  # fmt: skip
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
    "BriaFiboTransformer2DModel", dense=2, kind="joint", before=TEXT, source="given", image=True,
)  # fmt: skip
def bria_fibo(grid: Grid, batch: int) -> Made:
    model = build(
        "BriaFiboTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6], text_encoder_dim=8,
    )  # fmt: skip
    return model, {
        "hidden_states": text(batch, 4, grid[1] * grid[2]),
        "encoder_hidden_states": text(batch),
        "text_encoder_layers": [text(batch, 8), text(batch, 8)],
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions(grid),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


@case(
    "Kandinsky6Transformer3DModel", dense=2, others=4,
    note="two streams of text, one of them for audio",
)  # fmt: skip
def kandinsky6(grid: Grid, batch: int) -> Made:
    model = build(
        "Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=16,
        in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32, num_text_blocks=1,
        num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, grid[0], 2 * grid[1], 2 * grid[2], 4),
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.full((batch,), 5.0),
        "return_dict": False,
    }


@case("LuminaNextDiT2DModel", dense=2, others=2, image=True, note="a mask that is all true")
def lumina_next(grid: Grid, batch: int) -> Made:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = build(
        "LuminaNextDiT2DModel", sample_size=28, patch_size=2, in_channels=4, hidden_size=32,
        num_layers=2, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        cross_attention_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": image(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": text(batch),
        "encoder_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }
