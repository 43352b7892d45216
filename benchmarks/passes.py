"""What the passes cost beside inductor: `python -m benchmarks.passes [--layers 60]`.

Compiles a Wan transformer of many layers, tiny in width, with the backend on the CPU, caches off.
Both the time of the passes and that of inductor depend on the number of nodes, hardly on widths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from freqopt.backend import freqopt_backend

LIMIT_S, LIMIT_SHARE = 1.0, 0.05


@dataclass
class Times:
    """Seconds of the passes and of inductor; nodes and rewritten sites of the graph."""

    passes: float = 0.0
    inductor: float = 0.0
    nodes: int = 0
    split: int = 0


def measure(layers: int) -> Times:
    """Compile once, with every self-attention split at threshold 0."""
    from diffusers import WanTransformer3DModel
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    times = Times()

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        times.nodes = len(gm.graph.nodes)
        times.split = sum("split_attention" in str(node.target) for node in gm.graph.nodes)
        start = time.perf_counter()
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs))
        times.inductor = time.perf_counter() - start
        return compiled

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        options = {"threshold": 0.0, "min_tokens": 0, "strict": True, "inner": inner}
        start = time.perf_counter()
        compiled = freqopt_backend(gm, example_inputs, options=options)
        times.passes = time.perf_counter() - start - times.inductor
        return compiled

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=layers,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    with torch.no_grad(), config.patch(force_disable_caches=True):
        torch.compile(model, backend=backend, dynamic=False)(
            hidden_states=torch.randn(1, 4, 3, 12, 20), timestep=torch.tensor([5]),
            encoder_hidden_states=torch.randn(1, 7, 16), return_dict=False,
        )  # fmt: skip
    return times


def main(arguments: list[str] | None = None) -> int:
    """Print the times; 1 if the passes take more than they may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=60)
    given = parser.parse_args(arguments)
    times = measure(given.layers)
    share = times.passes / times.inductor
    print(
        f"{given.layers} layers, {times.nodes} nodes, {times.split} sites split: passes "
        f"{times.passes:.2f} s, inductor {times.inductor:.1f} s, {100 * share:.2f} %"
    )
    allowed = LIMIT_S * max(given.layers / 60, 0.1)
    return int(times.split != given.layers or times.passes > allowed or share > LIMIT_SHARE)


if __name__ == "__main__":
    raise SystemExit(main())
