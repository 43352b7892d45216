"""HunyuanVideo: video and text share one attention; text stays exact, and its padding is masked.

    python examples/hunyuan_video.py

The stand-in is diffusers' class, tiny and untrained.
"""

import torch
from diffusers import HunyuanVideoTransformer3DModel

import freqopt

GRID, TEXT = (3, 10, 14), 7


def call(time: int) -> dict[str, torch.Tensor]:
    t, h, w = GRID
    mask = torch.ones(1, TEXT, dtype=torch.int64)
    mask[:, TEXT - 3 :] = 0  # the prompt is shorter than the room for it
    return {
        "hidden_states": torch.randn(1, 4, t, 2 * h, 2 * w),
        "timestep": torch.tensor([time]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def main() -> None:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    samples = [call(time) for time in (900, 700, 500, 300)]
    plan = freqopt.calibrate(model, samples, target_error=0.1, rounds=0, progress=False)

    with torch.no_grad():
        dense = model(**samples[1], return_dict=False)[0]
        model.compile(backend="freqopt", options={"plan": plan, "inner": "eager"})
        split = model(**samples[1], return_dict=False)[0]
    print(freqopt.counters())
    print(f"the output is off by {float((split - dense).norm() / dense.norm()):.4f}")


if __name__ == "__main__":
    main()
