"""HunyuanVideo whose weights are kept on the CPU: without a compiler, as hooks break its graphs.

python examples/optimize_hunyuan.py path/to/model folder/of/plans
"""

import sys

import torch
from diffusers import HunyuanVideoPipeline

import freqopt

pipe = HunyuanVideoPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
handle = freqopt.optimize(pipe, sys.argv[2])  # route "auto" finds the hooks and says so
pipe("a dog at the beach")
print(handle)
