"""Flux: images of several sizes, calibrated on the prompts of a file.

python examples/optimize_flux.py path/to/model prompts.txt
"""

import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline

import freqopt

pipe = FluxPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to("cuda")
prompts = Path(sys.argv[2]).read_text().splitlines()
handle = freqopt.optimize(pipe, prompts=prompts, target_error=0.03)
for height, width in ((1024, 1024), (768, 1360)):
    pipe("a dog at the beach", height=height, width=width)
print(handle)
handle.save("flux-plans")
