"""Wan 2.1 and 2.2: one line on the pipeline, from prompts to a folder of plans.

python examples/optimize_wan.py path/to/model
"""

import sys

import torch
from diffusers import WanPipeline

import freqopt

pipe = WanPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to("cuda")
handle = freqopt.optimize(
    pipe,
    prompts=["a cat on a sofa", "waves at night", "a street in the rain"],
    target_error=0.03,
    run_options={"num_inference_steps": 20},
)
pipe("a dog at the beach")
print(handle)
handle.save("wan-plans")
