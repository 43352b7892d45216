"""The zoo's model distilled to four steps: a small adapter beside the shipped weights.

`python -m freqopt.models_zoo.training.distil` writes it. Steps are those of
`sampling.sample(model, steps=STEPS)`, which needs no other change.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from freqopt.models_zoo.low_rank import add_adapter
from freqopt.models_zoo.video_dit import WEIGHTS, VideoDiT, load_pretrained

STEPS = 4

ADAPTER = WEIGHTS.with_name("video_dit_4_steps.safetensors")


def fingerprint(path: Path = WEIGHTS) -> str:
    """What an adapter's file says of the weights that it belongs to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_distilled(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    path: Path = ADAPTER,
) -> VideoDiT:
    """The model that samples in `STEPS` steps, in evaluation mode, its adapter merged.

    Raises:
        FileNotFoundError: no adapter at `path`.
        ValueError: the file at `path` is damaged, or was made for other weights than are here.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no adapter at {path}; make it in a checkout with "
            f"`python -m freqopt.models_zoo.training.distil --out {path.parent}` "
            "(two minutes on a data-centre GPU)"
        )
    model = load_pretrained()
    made_for = add_adapter(model, path).get("base")
    if made_for != fingerprint():
        raise ValueError(
            f"the adapter at {path} belongs to the weights {made_for}, and {WEIGHTS} are "
            f"{fingerprint()}: distil anew with `python -m freqopt.models_zoo.training.distil`"
        )
    return model.to(device=device, dtype=dtype).eval()
