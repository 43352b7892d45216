"""LTX with a step cache, another target from the same plan, and a report.

python examples/optimize_ltx.py path/to/model folder/of/plans
"""

import sys

import torch
from diffusers import FirstBlockCacheConfig, LTXPipeline

import freqopt

pipe = LTXPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to("cuda")
pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
plan = freqopt.Plan.from_pretrained(sys.argv[2])
handle = freqopt.optimize(pipe, plan.at(target_error=0.05))
pipe("a dog at the beach")
print(handle)
handle.report("ltx.html")
