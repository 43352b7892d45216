"""VideoMAE: an encoder, without timesteps; the error that counts is that of its features.

    python examples/videomae.py

The stand-in is transformers' class, tiny and untrained. In earnest
`model = VideoMAEModel.from_pretrained("path/to/videomae")` and `clips` are yours.
"""

import torch
from transformers import VideoMAEConfig, VideoMAEModel

import freqopt


def main() -> None:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32,
        patch_size=2,
        num_frames=6,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = VideoMAEModel(config).eval()
    clips = [{"pixel_values": torch.randn(1, 6, 3, 32, 32)} for _ in range(4)]

    plan = freqopt.calibrate(model, clips, target_error=0.1, rounds=0, progress=False)
    with torch.no_grad():
        dense = model(**clips[1]).last_hidden_state
        compiled = torch.compile(model, backend="freqopt", options={"plan": plan, "inner": "eager"})
        split = compiled(**clips[1]).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(split, dense, dim=-1)
    print(freqopt.counters())
    print(f"least cosine of a patch's features with the dense model's: {float(cosine.min()):.4f}")


if __name__ == "__main__":
    main()
