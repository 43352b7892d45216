"""Several GPUs, a copy of the model on each: one calibrates, all compile with its plan.

    torchrun --nproc-per-node 2 examples/several_gpus.py

Each rank works on prompts of its own. Without torchrun it is one rank; without GPUs, CPUs do.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import freqopt
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig


def main() -> None:
    gpus, rank, ranks = torch.cuda.is_available(), 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if gpus else "gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpus else torch.device("cpu")

    torch.manual_seed(0)  # the same weights everywhere
    config = VideoDiTConfig(width=32, layers=2, heads=2, mlp_width=32, rope_axes=(4, 6, 6))
    model = VideoDiT(config).to(device).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # untrained models end in zeros

    found = [""]
    if rank == 0:
        video = torch.randn(4, 1, 3, 3, 40, 56, device=device)
        times = torch.tensor([[0.8], [0.6], [0.4], [0.2]], device=device)
        samples = [{"video": v, "timestep": t} for v, t in zip(video, times, strict=True)]
        plan = freqopt.calibrate(model, samples, target_error=0.1, rounds=0, progress=False)
        found = [plan.text()]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0, device=device)
    path = Path(tempfile.mkdtemp()) / "plan.json"
    path.write_text(found[0], encoding="utf-8")

    compiled = torch.compile(model, backend="freqopt", options={"plan": path, "inner": "eager"})
    with torch.no_grad():
        compiled(torch.randn(1, 3, 3, 40, 56, device=device), torch.rand(1, device=device))
    print(f"rank {rank} of {ranks}: {freqopt.counters().split} attention calls were split")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
