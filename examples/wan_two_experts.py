"""Wan 2.2: one transformer for noisy steps, one for clean ones, and a plan for each.

    python examples/wan_two_experts.py

The stand-in is diffusers' class, tiny and untrained. In earnest
`pipe = WanPipeline.from_pretrained("path/to/Wan2.2", torch_dtype=torch.bfloat16).to("cuda")`
"""

import torch
from diffusers import WanTransformer3DModel

import freqopt

GRID = (3, 10, 14)  # frames, rows and columns of patches


def expert() -> WanTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 32}
    return WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=16, freq_dim=16, rope_max_seq_len=32, **sizes
    ).eval()


class Pipeline:
    """What a pipeline of diffusers is to freqopt: modules, and a call that runs them."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = expert(), expert()

    @torch.no_grad()
    def __call__(self, prompt: str) -> torch.Tensor:
        """A video for a prompt."""
        t, h, w = GRID
        video, text = torch.randn(1, 4, t, 2 * h, 2 * w), torch.randn(1, 7, 16)
        for time in (950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0, 250.0):
            model = self.transformer if time > 600 else self.transformer_2
            velocity = model(video, torch.tensor([time]), text, return_dict=False)[0]
            video = video - 0.1 * velocity
        return video


def main() -> None:
    torch.manual_seed(0)
    pipe = Pipeline()
    experts = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}

    # One run of the pipeline shows both their inputs.
    plans = freqopt.calibrate(
        experts, lambda: pipe("a fox in the snow"), target_error=0.1, rounds=0, progress=False
    )
    for name, model in experts.items():
        model.compile(backend="freqopt", options={"plan": plans[name], "inner": "eager"})
    pipe("a fox in the snow")
    print(plans)
    print(freqopt.counters())


if __name__ == "__main__":
    main()
