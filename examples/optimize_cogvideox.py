"""CogVideoX with plans from a folder, its blocks compiled; then dense again.

python examples/optimize_cogvideox.py path/to/model folder/of/plans
"""

import sys

import torch
from diffusers import CogVideoXPipeline

import freqopt

pipe = CogVideoXPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to("cuda")
with freqopt.optimize(pipe, sys.argv[2], route="regional") as handle:
    pipe("a dog at the beach")
    print(handle)
pipe("a dog at the beach")  # dense, as before
