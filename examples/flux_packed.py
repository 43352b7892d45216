"""Flux: tokens are packed before the model, so the grid comes with the positions among the inputs.

    python examples/flux_packed.py

The stand-in is diffusers' class, tiny and untrained. In earnest `inputs` are those of
`pipe.transformer`, recorded with `freqopt.recording(pipe.transformer)` while the pipeline runs.
"""

import torch
from diffusers import FluxTransformer2DModel

import freqopt

ROWS, COLUMNS, TEXT = 16, 24, 7


def call(time: float) -> dict[str, torch.Tensor]:
    row, column = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
    return {
        "hidden_states": torch.randn(1, ROWS * COLUMNS, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([time]),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def main() -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    model = FluxTransformer2DModel(
        in_channels=4,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 8),
        joint_attention_dim=16,
        pooled_projection_dim=8,
        **sizes,
    ).eval()
    samples = [call(time) for time in (0.9, 0.7, 0.5, 0.3)]

    print(freqopt.inspect(model, min_tokens=1, **samples[0]))
    plan = freqopt.calibrate(model, samples, target_error=0.1, rounds=0, progress=False)
    print(f"the grid, read off the positions: {plan.grids}")

    model.compile(backend="freqopt", options={"plan": plan, "inner": "eager"})
    with torch.no_grad():
        model(**samples[0])
    print(freqopt.counters())


if __name__ == "__main__":
    main()
