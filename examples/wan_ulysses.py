"""Wan's transformer on several GPUs: tokens shared out, heads dealt out (Ulysses), split by a plan.

torchrun --nproc-per-node 4 examples/wan_ulysses.py Wan-AI/Wan2.1-T2V-14B-Diffusers wan.plan.json
The plan is one made on one GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel

import freqopt


def main(given: Sequence[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or name of a Wan model")
    parser.add_argument("plan", help="its plan, from freqopt.calibrate")
    parser.add_argument("--latents", type=int, nargs=3, default=(21, 90, 160), help="t h w")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--inner", default="inductor")
    args = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device, dtype = (f"cuda:{rank}", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if on_gpu:
        torch.cuda.set_device(device)
    model = WanTransformer3DModel.from_pretrained(args.model, subfolder="transformer")
    model.to(device, dtype)
    torch.manual_seed(0)  # all ranks make the same noise
    latents = torch.randn(1, model.config.in_channels, *args.latents).to(device, dtype)
    words = torch.randn(1, 512, model.config.text_dim).to(device, dtype)  # in place of a prompt
    with torch.no_grad():
        first = torch.tensor([999.0], device=device)
        call = (latents, first, words), {"return_dict": False}
        balanced = freqopt.parallel.balance(model, freqopt.Plan.load(args.plan), count, call)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))
        model(*call[0], **call[1])  # its hooks set themselves up, which does not compile
        freqopt.attach(model, balanced.plan)
        model.compile_repeated_blocks(backend="freqopt", options={"inner": args.inner})
        for step in range(args.steps):
            start, now = time.perf_counter(), first * (1 - step / args.steps)
            latents = latents - model(latents, now, words, return_dict=False)[0] / args.steps
            if rank == 0:
                print(f"step {step}: {latents.std():.3f}, {time.perf_counter() - start:.2f} s")
    if rank == 0:
        print(balanced, freqopt.counters(), sep="\n")
    return latents


if __name__ == "__main__":
    main()
