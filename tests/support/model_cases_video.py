"""Video models of diffusers that make tokens out of latents themselves, but for Wan's kin."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TEXT, Grid, Made, build, case, latents, steps, text

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_inputs(grid: Grid, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[0, TEXT - 3 :] = 0
    return {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


@case(
    "HunyuanVideoTransformer3DModel",
    dense=2,
    others=1,
    kind="joint",
    after=TEXT,
    note="text padding is masked",
)
def hunyuan(grid: Grid, batch: int) -> Made:
    model = build("HunyuanVideoTransformer3DModel", **HUNYUAN)
    return model, hunyuan_inputs(grid, batch)


@case(
    "HunyuanVideo15Transformer3DModel",
    dense=1,
    others=1,
    kind="joint",
    after=16,
    batches=(1,),
    source="given",
    note="graph breaks; one graph serves all blocks",
)
def hunyuan15(grid: Grid, batch: int) -> Made:
    model = build(
        "HunyuanVideo15Transformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="i2v",
    )
    return model, {
        "hidden_states": latents(grid, batch, patch=(1, 1, 1)),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_2": text(batch, 12, 4),
        "encoder_attention_mask_2": torch.tensor([[1.0, 1, 0, 0]]).repeat(batch, 1),
        "image_embeds": text(batch, 8, 5),
        "return_dict": False,
    }


@case(
    "HunyuanVideoFramepackTransformer3DModel",
    dense=2,
    others=1,
    kind="joint",
    before=12 + 20,
    frames=2,
    grids=((5, 7, 9),),
    batches=(1,),
    fullgraph=True,
    note="history comes first: two coarser grids stay exact, two frames of the same grid join it; "
    "the number of text tokens depends on data",
)
def framepack(grid: Grid, batch: int) -> Made:
    config = HUNYUAN | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    model = build("HunyuanVideoFramepackTransformer3DModel", **config)
    inputs = hunyuan_inputs(grid, batch) | {
        "image_embeds": text(batch, 16, 5),
        "indices_latents": torch.arange(grid[0]),
        "latents_clean": latents((2, *grid[1:]), batch),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": latents((2, *grid[1:]), batch),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": latents((8, *grid[1:]), batch),
        "indices_latents_history_4x": torch.arange(8),
    }
    return model, inputs


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}


def cogvideox_inputs(grid: Grid, batch: int, frames: int = 1) -> dict[str, Any]:
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "hidden_states": latents(grid, batch, patch=(frames, 2, 2)).transpose(1, 2).contiguous(),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "image_rotary_emb": (torch.randn(tokens, 8), torch.randn(tokens, 8)),
        "return_dict": False,
    }


@case("CogVideoXTransformer3DModel", dense=2, kind="joint", before=TEXT)
def cogvideox(grid: Grid, batch: int) -> Made:
    model = build("CogVideoXTransformer3DModel", **COGVIDEOX)
    return model, cogvideox_inputs(grid, batch)


@case(
    "CogVideoXTransformer3DModel",
    dense=2,
    kind="joint",
    before=TEXT,
    note="1.5: linear on rearranged patches",
)
def cogvideox15(grid: Grid, batch: int) -> Made:
    config = COGVIDEOX | {"patch_size_t": 2, "patch_bias": False, "sample_frames": 17}
    return build("CogVideoXTransformer3DModel", **config), cogvideox_inputs(grid, batch, 2)


@case("ConsisIDTransformer3DModel", dense=2, others=7, kind="joint", before=TEXT)
def consisid(grid: Grid, batch: int) -> Made:
    model = build(
        "ConsisIDTransformer3DModel",
        **COGVIDEOX,
        is_train_face=True,
        is_kps=False,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=4,
        LFE_vit_dim=4,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=3,
        LFE_output_dim=10,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    face = {
        "id_vit_hidden": [torch.randn(batch, 2, 4)],
        "id_cond": torch.randn(batch, 4),
    }
    return model, cogvideox_inputs(grid, batch) | face


@case("EasyAnimateTransformer3DModel", dense=2, kind="joint", before=TEXT)
def easyanimate(grid: Grid, batch: int) -> Made:
    model = build(
        "EasyAnimateTransformer3DModel",
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        mmdit_layers=1,
        num_layers=2,
        patch_size=2,
        sample_height=60,
        sample_width=90,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case(
    "MochiTransformer3DModel",
    dense=2,
    others=1,
    kind="joint",
    after=TEXT,
    fullgraph=True,
    batches=(1,),
    note="compile with fullgraph=True; the number of text tokens depends on data",
)
def mochi(grid: Grid, batch: int) -> Made:
    model = build(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "return_dict": False,
    }


@case("CosmosTransformer3DModel", dense=2, others=2)
def cosmos(grid: Grid, batch: int) -> Made:
    model = build(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 64, 64),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    return model, cosmos_inputs(grid, batch)


def cosmos_inputs(grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 2 * grid[1], 2 * grid[2]),
        "return_dict": False,
    }


@case("CosmosTransformer3DModel", dense=2, others=2, note="Predict2: no learned positions")
def cosmos2(grid: Grid, batch: int) -> Made:
    model = build(
        "CosmosTransformer3DModel",
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 64, 64),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        rope_scale=(1.0, 3.0, 3.0),
    )
    condition = torch.zeros(batch, 1, grid[0], 2 * grid[1], 2 * grid[2])
    return model, cosmos_inputs(grid, batch) | {"condition_mask": condition}


@case("Kandinsky5Transformer3DModel", dense=2, others=3, batches=(1,))
def kandinsky5(grid: Grid, batch: int) -> Made:
    model = build(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    return model, {
        "hidden_states": latents(grid, batch).permute(0, 2, 3, 4, 1).contiguous(),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 8),
        "visual_rope_pos": tuple(torch.arange(extent) for extent in grid),
        "text_rope_pos": torch.arange(TEXT),
        "return_dict": False,
    }


@case(
    "Kandinsky6Transformer3DModel",
    dense=2,
    others=4,
    note="two streams of text, one of them for audio",
)
def kandinsky6(grid: Grid, batch: int) -> Made:
    model = build(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
    )
    return model, {
        "hidden_states": torch.randn(batch, grid[0], 2 * grid[1], 2 * grid[2], 4),
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.full((batch,), 5.0),
        "return_dict": False,
    }


@case("AllegroTransformer3DModel", dense=2, others=2)
def allegro(grid: Grid, batch: int) -> Made:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = build(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=16,
    )
    t, h, w = grid
    tables = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (h, w)), (h, w), t)
    places = torch.cartesian_prod(*(table.to(torch.int64) for table in tables[3:]))
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "image_rotary_emb": (tables[:3], places.T.reshape(3, 1, -1).contiguous().unbind()),
        "return_dict": False,
    }


@case(
    "LatteTransformer3DModel",
    dense=0,
    others=3,
    source="",
    grids=((3, 6, 6), (5, 7, 7)),
    note="attends in space and in time",
)
def latte(grid: Grid, batch: int) -> Made:
    model = build(
        "LatteTransformer3DModel",
        sample_size=2 * grid[1],
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=grid[0],
    )
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("MotifVideoTransformer3DModel", dense=2, others=0, kind="joint", after=TEXT)
def motif(grid: Grid, batch: int) -> Made:
    model = build(
        "MotifVideoTransformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_decoder_layers=0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        image_embed_dim=4,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=False,
        enable_text_cross_attention_single=False,
    )
    return model, {
        "hidden_states": latents(grid, batch, 9, (1, 1, 1)),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("SanaVideoTransformer3DModel", dense=0, others=2, source="", note="linear attention")
def sana_video(grid: Grid, batch: int) -> Made:
    model = build(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


@case("JoyImageEditTransformer3DModel", dense=2, kind="joint", after=TEXT)
def joyimage(grid: Grid, batch: int) -> Made:
    model = build(
        "JoyImageEditTransformer3DModel",
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    return model, {
        "hidden_states": latents(grid, batch),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }
