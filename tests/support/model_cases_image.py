"""Image models of diffusers: grids of one frame."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TEXT, Grid, Made, build, case, image, inner, steps, text


def inputs_of(grid: Grid, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": image(grid, batch),
        "timestep": steps(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    } | more


@case("SD3Transformer2DModel", dense=2, kind="joint", after=TEXT, image=True)
def sd3(grid: Grid, batch: int) -> Made:
    model = build(
        "SD3Transformer2DModel",
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=32,
    )
    return model, inputs_of(grid, batch, pooled_projections=torch.randn(batch, 8))


@case(
    "SD3Transformer2DModel",
    dense=3,
    image=True,
    each=(("joint", 0, TEXT), ("self", 0, 0), ("joint", 0, TEXT)),
    note="3.5: the image attends to itself besides",
)
def sd35(grid: Grid, batch: int) -> Made:
    model = build(
        "SD3Transformer2DModel",
        sample_size=64,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=40,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": image(grid, batch),
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": steps(batch),
        "return_dict": False,
    }


@case("AuraFlowTransformer2DModel", dense=2, kind="joint", before=TEXT + 8, image=True)
def auraflow(grid: Grid, batch: int) -> Made:
    model = build(
        "AuraFlowTransformer2DModel",
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=1024,
    )
    return model, inputs_of(grid, batch, timestep=torch.full((batch,), 0.5))


@case("PixArtTransformer2DModel", dense=2, others=2, image=True)
def pixart(grid: Grid, batch: int) -> Made:
    model = build(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return model, inputs_of(
        grid, batch, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    )


@case("DiTTransformer2DModel", dense=2, image=True, grids=((1, 18, 18),))
def dit(grid: Grid, batch: int) -> Made:
    model = build(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=36,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model, {
        "hidden_states": image(grid, batch),
        "timestep": steps(batch),
        "class_labels": torch.zeros(batch, dtype=torch.int64),
        "return_dict": False,
    }


@case("SanaTransformer2DModel", dense=0, others=2, source="", image=True, note="linear attention")
def sana(grid: Grid, batch: int) -> Made:
    model = build(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        patch_size=2,
    )
    return model, inputs_of(grid, batch)


@case("CogView3PlusTransformer2DModel", dense=2, kind="joint", before=TEXT, image=True)
def cogview3plus(grid: Grid, batch: int) -> Made:
    model = build(
        "CogView3PlusTransformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=32,
        sample_size=16,
    )
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


@case("CogView4Transformer2DModel", dense=2, kind="joint", before=TEXT, image=True)
def cogview4(grid: Grid, batch: int) -> Made:
    model = build(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(32, 32),
    )
    size = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
    return model, inputs_of(
        grid, batch, original_size=size, target_size=size, crop_coords=torch.zeros(batch, 2)
    )


@case("GlmImageTransformer2DModel", dense=2, kind="joint", before=TEXT, image=True, fullgraph=True)
def glm_image(grid: Grid, batch: int) -> Made:
    model = build(
        "GlmImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=64,
    )
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


@case("ErnieImageTransformer2DModel", dense=2, kind="joint", after=TEXT, image=True)
def ernie(grid: Grid, batch: int) -> Made:
    model = build(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        text_in_dim=16,
        rope_theta=256,
        rope_axes_dim=(8, 4, 4),
        qk_layernorm=True,
    )
    return model, {
        "hidden_states": image(grid, batch, patch=1),
        "timestep": torch.ones(batch),
        "text_bth": text(batch),
        "text_lens": torch.full((batch,), TEXT),
        "return_dict": False,
    }


@case("HunyuanDiT2DModel", dense=2, others=3, image=True)
def hunyuan_dit(grid: Grid, batch: int) -> Made:
    model = build(
        "HunyuanDiT2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=4,
        hidden_size=16,
        text_len=TEXT,
        text_len_t5=TEXT,
    )
    tokens = grid[1] * grid[2]
    return model, inputs_of(
        grid,
        batch,
        text_embedding_mask=torch.ones(batch, TEXT),
        timestep=steps(batch).float(),
        encoder_hidden_states_t5=text(batch),
        text_embedding_mask_t5=torch.ones(batch, TEXT),
        image_meta_size=torch.zeros(batch, 6),
        style=torch.zeros(batch, dtype=torch.int64),
        image_rotary_emb=(torch.randn(tokens, 8), torch.randn(tokens, 8)),
    )


@case(
    "HunyuanImageTransformer2DModel",
    dense=2,
    others=1,
    kind="joint",
    after=TEXT,
    image=True,
    note="guidance",
)
def hunyuan_image(grid: Grid, batch: int) -> Made:
    model = build(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        rope_axes_dim=(8, 8),
        guidance_embeds=True,
    )
    return model, {
        "hidden_states": image(grid, batch, 4, 1),
        "timestep": steps(batch, torch.float32),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.int64),
        "guidance": torch.full((batch,), 3.0),
        "return_dict": False,
    }


@case(
    "Lumina2Transformer2DModel",
    dense=1,
    others=3,
    source="given",
    image=True,
    batches=(1,),
    note="text lengths are data: the graph breaks before text and image are joined",
)
def lumina2(grid: Grid, batch: int) -> Made:
    model = build(
        "Lumina2Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    return model, inputs_of(
        grid, batch, encoder_attention_mask=mask, timestep=torch.full((batch,), 0.5)
    )


@case("LuminaNextDiT2DModel", dense=2, others=2, image=True, note="a mask that is all true")
def lumina_next(grid: Grid, batch: int) -> Made:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = build(
        "LuminaNextDiT2DModel",
        sample_size=28,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return model, {
        "hidden_states": image(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": text(batch),
        "encoder_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


@case(
    "ZImageTransformer2DModel",
    dense=3,
    others=1,
    grids=((1, 18, 10),),
    each=(("joint", 0, 12), ("joint", 0, 44), ("joint", 0, 44)),
    note="tokens are filled up to multiples of 32; so is the text",
)
def z_image(grid: Grid, batch: int) -> Made:
    model = build(
        "ZImageTransformer2DModel",
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    return model, {
        "x": [torch.randn(4, 1, 2 * grid[1], 2 * grid[2]) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [torch.randn(TEXT, 16) for _ in range(batch)],
        "return_dict": False,
    }


@case(
    "HiDreamImageTransformer2DModel",
    dense=1,
    others=1,
    kind="joint",
    after=3 * TEXT,
    source="given",
    grids=((1, 16, 16),),
    batches=(1,),
    note="experts break the graph: single-stream blocks get text and image as one axis",
)
def hidream(grid: Grid, batch: int) -> Made:
    model = build(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    return model, {
        "hidden_states": image(grid, batch),
        "timesteps": steps(batch),
        "encoder_hidden_states_t5": text(batch, 8),
        "encoder_hidden_states_llama3": torch.randn(2, batch, TEXT, 4),
        "pooled_embeds": torch.randn(batch, 8),
        "return_dict": False,
    }


@case(
    "PRXTransformer2DModel",
    dense=2,
    kind="text in keys",
    before=TEXT,
    grids=((1, 16, 20),),
    note="image queries, text in the keys only",
)
def prx(grid: Grid, batch: int) -> Made:
    model = build(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    return model, {
        "hidden_states": image(grid, batch),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


FIBO2 = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 16,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 8,
    "max_num_gist_tokens": 16,
    "gist_step": 4,
    "gist_min_text_len": 4,
    "gist_max_text_len": 32,
    "axes_dims": (4, 6, 6),
    "axes_lens": (64, 64, 64),
}


@case(
    "BriaFibo2Transformer2DModel",
    dense=3,
    others=3,
    image=True,
    each=(("self", 0, 0), ("joint", 12, 0), ("joint", 12, 0)),
    note="text becomes 12 tokens, which come first",
)
def bria_fibo2(grid: Grid, batch: int) -> Made:
    return build("BriaFibo2Transformer2DModel", **FIBO2), {
        "hidden_states": image(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 2, TEXT, 16),
        "return_dict": False,
    }


@case(
    "BriaFibo2Transformer2DModel",
    dense=3,
    others=3,
    image=True,
    each=(("joint", 0, 48), ("joint", 12, 48), ("joint", 12, 48)),
    note="an image to edit, on a grid of its own, comes last and stays exact",
)
def bria_fibo2_edit(grid: Grid, batch: int) -> Made:
    model, inputs = bria_fibo2(grid, batch)
    return model, inputs | {"context_latents": [image((1, 6, 8), batch)]}


@case("UVit2DModel", dense=2, others=6, image=True, note="a U-Net of tokens of a codebook")
def uvit(grid: Grid, batch: int) -> Made:
    model = inner(
        "UVit2DModel",
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=16,
        vocab_size=40,
        codebook_size=32,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        sample_size=16,
    )
    return model, {
        "input_ids": torch.randint(0, 32, (batch, *grid[1:])),
        "encoder_hidden_states": text(batch),
        "pooled_text_emb": torch.randn(batch, 16),
        "micro_conds": torch.rand(batch, 5),
    }
