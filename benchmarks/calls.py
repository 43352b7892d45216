"""What freqopt does at each call outside the graph: `python -m benchmarks.calls`, on the CPU.

Counting calls, noting probes and timesteps, and (by blocks) asking which layer runs and on which
grid: measured with a stand-in for the compiled graph, which returns what it returned once. With it
come the seconds of all passes over a Wan transformer of 60 layers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.common import environment, write
from benchmarks.passes import compile_wan, run_passes, split_sites
from freqopt.backend import freqopt_backend

LIMIT_US, LIMIT_S = 50.0, 1.0
HEADS, DIM = 2, 16
SUPPORT = Path(__file__).parents[1] / "tests" / "support"


class Attention(nn.Module):
    """Self-attention over a video."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """What is compiled, with an attention inside as models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C)."""
        return x + self.attn(x)


class Video(nn.Module):
    """Layers of attention over latents."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, HEADS * DIM, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, video: Tensor) -> Tensor:
        """video: (B, C, T, H, W)."""
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class Replaying:
    """A compiled graph that computes once, and then returns the same."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.result = forward, None

    def __call__(self, *arguments: Any) -> Any:
        """What it returned first."""
        if self.result is None:
            self.result = self.forward(*arguments)
        return self.result


def seconds_of_passes(layers: int) -> float:
    """CPU seconds of all passes, with every self-attention of a Wan transformer split."""
    found = [0.0]

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        assert split_sites(gm) == layers
        return gm.forward

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.process_time()  # of this process, whatever else the machine does
        compiled: Callable[..., Any] = run_passes(gm, example_inputs, inner)
        found[0] = time.process_time() - start
        return compiled

    compile_wan(layers, backend)
    return found[0]


def microseconds_a_call(layers: int, *, by_blocks: bool, repeat: int = 200) -> float:
    """What the backend's own function takes in a call of the model, beside the graph itself.

    By blocks that is the sum over all layers, with a plan attached. The shortest of all calls
    counts: whatever else the machine does makes the others longer.
    """
    import freqopt

    sys.path.insert(0, str(SUPPORT))
    from plans import plan_of

    model = Video(layers).eval()
    video = torch.randn(1, 4, 3, 12, 20)
    spent = [0.0]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        options: dict[str, Any] = {"min_tokens": 0, "inner": replaying}
        if not by_blocks:
            options["threshold"] = 1.0
        compiled = freqopt_backend(gm, example_inputs, options=options)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = compiled(*arguments)
            spent[0] += time.perf_counter() - start
            return found

        return timed

    def replaying(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Replaying:
        return Replaying(gm.forward)

    with torch.no_grad():
        if by_blocks:
            freqopt.attach(model, plan_of(model, {"video": video}, 1.0))
            for block in model.blocks:
                block.compile(backend=backend)
            run: Callable[[Tensor], Any] = model
        else:
            run = torch.compile(model, backend=backend)
        for _ in range(5):
            run(video)
        times = []
        for _ in range(repeat):
            spent[0] = 0.0
            run(video)
            times.append(1e6 * spent[0])
    return min(times)


def main(arguments: list[str] | None = None) -> int:
    """Write the result file; 1 if anything takes more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": environment() | {"cores": f"{os.cpu_count()}, shared with other work"},
        "passes_s_60_layers": round(min(seconds_of_passes(60) for _ in range(2)), 3),
        "whole_us_40_layers": round(microseconds_a_call(40, by_blocks=False), 1),
        "by_blocks_us_40_layers": round(microseconds_a_call(40, by_blocks=True), 1),
    }
    write("calls", result, given.out)
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    calls = max(result["whole_us_40_layers"], result["by_blocks_us_40_layers"])
    slow = result["passes_s_60_layers"] > LIMIT_S or calls > LIMIT_US
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
