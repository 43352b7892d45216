"""Encoders of images and video, of transformers."""

from __future__ import annotations

import torch
from model_cases import SMALL, Grid, Made, encoder, encoder_case, image

SQUARE_VIDEO: tuple[Grid, ...] = ((3, 8, 8), (5, 7, 7), (1, 18, 18))
SQUARE: tuple[Grid, ...] = ((1, 16, 16), (1, 18, 18))
WIDE: tuple[Grid, ...] = ((1, 14, 22), (1, 15, 21), (1, 16, 20))


def frames(grid: Grid, batch: int, tubelet: int = 2) -> torch.Tensor:
    """(B, T, 3, H, W) with patches of 2 x 2."""
    return torch.randn(batch, grid[0] * tubelet, 3, 2 * grid[1], 2 * grid[2])


@encoder_case("VideoMAEModel", dense=2, grids=SQUARE_VIDEO)
def videomae(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VideoMAEModel",
        "VideoMAEConfig",
        **SMALL,
        image_size=2 * grid[1],
        patch_size=2,
        num_frames=2 * grid[0],
        tubelet_size=2,
        intermediate_size=32,
    )
    return model, {"pixel_values": frames(grid, batch)}


@encoder_case("VideoMAEModel", dense=2, grids=SQUARE_VIDEO, note="attention written out (eager)")
def videomae_eager(grid: Grid, batch: int) -> Made:
    model, inputs = videomae(grid, batch)
    model.set_attn_implementation("eager")
    return model, inputs


@encoder_case("VJEPA2Model", dense=2, grids=SQUARE_VIDEO, note="encoder")
def vjepa2(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VJEPA2Model",
        "VJEPA2Config",
        **(SMALL | {"hidden_size": 48}),
        patch_size=2,
        crop_size=2 * grid[1],
        frames_per_clip=2 * grid[0],
        tubelet_size=2,
        mlp_ratio=1,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )
    return model, {"pixel_values_videos": frames(grid, batch), "skip_predictor": True}


@encoder_case(
    "TimesformerModel",
    dense=0,
    others=4,
    source="",
    grids=SQUARE_VIDEO[:2],
    note="attends in time, then in space",
)
def timesformer(grid: Grid, batch: int) -> Made:
    model = encoder(
        "TimesformerModel",
        "TimesformerConfig",
        **SMALL,
        image_size=2 * grid[1],
        patch_size=2,
        num_frames=grid[0],
        intermediate_size=32,
    )
    return model, {"pixel_values": frames(grid, batch, 1)}


@encoder_case(
    "TimesformerModel",
    dense=2,
    before=1,
    kind="joint",
    grids=SQUARE_VIDEO[:2],
    order=(1, 2, 0),
    note="joint attention in time and space, time fastest; a class token in front",
)
def timesformer_joint(grid: Grid, batch: int) -> Made:
    t, h, _ = grid
    model = encoder(
        "TimesformerModel",
        "TimesformerConfig",
        **SMALL,
        image_size=2 * h,
        patch_size=2,
        num_frames=t,
        intermediate_size=32,
        attention_type="joint_space_time",
    )
    return model, {"pixel_values": frames(grid, batch, 1)}


@encoder_case(
    "VivitModel",
    dense=2,
    kind="joint",
    before=1,
    grids=SQUARE_VIDEO,
    note="class token",
)
def vivit(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VivitModel",
        "VivitConfig",
        **SMALL,
        image_size=2 * grid[1],
        num_frames=2 * grid[0],
        tubelet_size=[2, 2, 2],
        intermediate_size=32,
    )
    return model, {"pixel_values": frames(grid, batch)}


@encoder_case(
    "XCLIPVisionModel",
    dense=2,
    others=2,
    kind="joint",
    before=1,
    after=1,
    grids=((1, 16, 16),),
    batches=(4,),
    note="a class token before and a message after each frame's; messages attend in time",
)
def xclip(grid: Grid, batch: int) -> Made:
    model = encoder(
        "XCLIPVisionModel",
        "XCLIPVisionConfig",
        **SMALL,
        intermediate_size=32,
        patch_size=2,
        image_size=2 * grid[1],
        num_frames=batch,
        mit_hidden_size=16,
        mit_intermediate_size=16,
        mit_num_attention_heads=2,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case("ViTModel", dense=2, kind="joint", before=1, image=True, note="class token")
def vit(grid: Grid, batch: int) -> Made:
    model = encoder(
        "ViTModel",
        "ViTConfig",
        **SMALL,
        image_size=(2 * grid[1], 2 * grid[2]),
        patch_size=2,
        intermediate_size=32,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case("Dinov2Model", dense=2, kind="joint", before=1, image=True, note="class token")
def dinov2(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Dinov2Model", "Dinov2Config", **SMALL, image_size=2 * grid[1], patch_size=2, mlp_ratio=1
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "Dinov2WithRegistersModel",
    dense=2,
    kind="joint",
    before=5,
    image=True,
    note="class token and registers",
)
def dinov2_registers(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        **SMALL,
        image_size=2 * grid[1],
        patch_size=2,
        mlp_ratio=1,
        num_register_tokens=4,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "DINOv3ViTModel",
    dense=2,
    kind="joint",
    before=4,
    image=True,
    note="class token and registers, rotary positions",
)
def dinov3(grid: Grid, batch: int) -> Made:
    config = SMALL | {"intermediate_size": 32, "patch_size": 2, "num_register_tokens": 3}
    model = encoder("DINOv3ViTModel", "DINOv3ViTConfig", **config)
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case("IJepaModel", dense=2, grids=SQUARE)
def ijepa(grid: Grid, batch: int) -> Made:
    config = SMALL | {"intermediate_size": 32, "patch_size": 2, "image_size": 2 * grid[1]}
    return encoder("IJepaModel", "IJepaConfig", **config), {"pixel_values": image(grid, batch, 3)}


@encoder_case("Aimv2VisionModel", dense=2, others=1, grids=SQUARE)
def aimv2(grid: Grid, batch: int) -> Made:
    config = SMALL | {"intermediate_size": 32, "patch_size": 2, "image_size": 2 * grid[1]}
    model = encoder("Aimv2VisionModel", "Aimv2VisionConfig", **config)
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "CLIPVisionModel",
    dense=2,
    kind="joint",
    before=1,
    image=True,
    grids=((1, 18, 18), (1, 16, 16)),
    note="class token",
)
def clip_vision(grid: Grid, batch: int) -> Made:
    model = encoder(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        **SMALL,
        image_size=2 * grid[1],
        patch_size=2,
        intermediate_size=32,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case("SiglipVisionModel", dense=2, others=1, image=True, grids=((1, 18, 18),))
def siglip(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        **SMALL,
        image_size=2 * grid[1],
        patch_size=2,
        intermediate_size=32,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case("DPTModel", dense=2, kind="joint", before=1, grids=SQUARE, note="class token")
def dpt(grid: Grid, batch: int) -> Made:
    model = encoder(
        "DPTModel",
        "DPTConfig",
        **SMALL,
        intermediate_size=32,
        patch_size=2,
        image_size=2 * grid[1],
        backbone_out_indices=[0, 1],
        neck_hidden_sizes=[8, 8],
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "YolosModel",
    dense=2,
    kind="joint",
    before=1,
    after=5,
    grids=WIDE,
    note="class token before, detection tokens after",
)
def yolos(grid: Grid, batch: int) -> Made:
    model = encoder(
        "YolosModel",
        "YolosConfig",
        **SMALL,
        intermediate_size=32,
        patch_size=2,
        image_size=[2 * grid[1], 2 * grid[2]],
        num_detection_tokens=5,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "VitDetModel", dense=1, others=1, grids=((1, 16, 16),), note="the other attends within windows"
)
def vitdet(grid: Grid, batch: int) -> Made:
    model = encoder(
        "VitDetModel",
        "VitDetConfig",
        **SMALL,
        patch_size=2,
        image_size=2 * grid[1],
        window_block_indices=[0],
        window_size=4,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "SamVisionModel",
    dense=0,
    others=2,
    source="",
    grids=((1, 16, 16),),
    note="a bias per pair, from queries and relative positions",
)
def sam(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SamVisionModel",
        "SamVisionConfig",
        **SMALL,
        mlp_dim=32,
        output_channels=16,
        patch_size=2,
        image_size=2 * grid[1],
        window_size=4,
        global_attn_indexes=[1],
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "BeitModel", dense=0, others=2, source="", grids=((1, 16, 16),), note="a learned bias per pair"
)
def beit_bias(grid: Grid, batch: int) -> Made:
    model = encoder(
        "BeitModel",
        "BeitConfig",
        **SMALL,
        intermediate_size=32,
        patch_size=2,
        image_size=2 * grid[1],
        use_relative_position_bias=True,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "Swinv2Model",
    dense=0,
    others=1,
    source="",
    grids=((1, 16, 16),),
    note="cosine scores with a learned temperature, in windows",
)
def swin(grid: Grid, batch: int) -> Made:
    model = encoder(
        "Swinv2Model",
        "Swinv2Config",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=4,
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "SwinModel",
    dense=0,
    others=3,
    source="",
    grids=((1, 16, 16),),
    note="windows, shifted ones too",
)
def swin_shifted(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SwinModel",
        "SwinConfig",
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        patch_size=2,
        image_size=2 * grid[1],
    )
    return model, {"pixel_values": image(grid, batch, 3)}


@encoder_case(
    "SegformerModel",
    dense=1,
    others=1,
    grids=((1, 16, 20),),
    note="the other has fewer keys than queries",
)
def segformer(grid: Grid, batch: int) -> Made:
    model = encoder(
        "SegformerModel",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
    )
    return model, {"pixel_values": image(grid, batch, 3, 4)}


@encoder_case(
    "PvtV2Model",
    dense=1,
    others=1,
    grids=((1, 16, 20),),
    note="the other has fewer keys than queries",
)
def pvt(grid: Grid, batch: int) -> Made:
    model = encoder(
        "PvtV2Model",
        "PvtV2Config",
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        image_size=64,
    )
    return model, {"pixel_values": image(grid, batch, 3, 4)}
