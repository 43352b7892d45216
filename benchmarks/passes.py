"""What the passes cost beside inductor: `python -m benchmarks.passes [--layers 60]`.

Compiles a Wan transformer of many layers, tiny in width, with the backend on the CPU, caches off.
Both the time of the passes and that of inductor depend on the number of nodes, hardly on widths.
Times are of one machine; `count` counts calls of functions, which are the same on every one.
"""

from __future__ import annotations

import argparse
import cProfile
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


Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def compile_wan(layers: int, backend: Backend) -> None:
    """Compile and run a small Wan transformer."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(
            hidden_states=torch.randn(1, 4, 3, 12, 20),
            timestep=torch.tensor([5]),
            encoder_hidden_states=torch.randn(1, 7, 16),
            return_dict=False,
        )


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: Backend) -> Any:
    """The backend, with every self-attention split at threshold 0."""
    options = {"threshold": 0.0, "min_tokens": 0, "strict": True, "inner": inner}
    return freqopt_backend(gm, example_inputs, options=options)


def count(layers: int) -> tuple[int, int]:
    """Calls of Python functions in the passes, and sites that they split."""
    found, profile = [0], cProfile.Profile()

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found[0] = split_sites(gm)
        return gm.forward

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = profile.runcall(run_passes, gm, example_inputs, inner)
        return compiled

    compile_wan(layers, backend)
    return sum(entry.callcount for entry in profile.getstats()), found[0]


def split_sites(gm: fx.GraphModule) -> int:
    """Sites of a graph that were rewritten."""
    return sum("split_attention" in str(node.target) for node in gm.graph.nodes)


def measure(layers: int) -> Times:
    """Compile once, with every self-attention split at threshold 0."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    times = Times()

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        times.nodes = len(gm.graph.nodes)
        times.split = split_sites(gm)
        start = time.perf_counter()
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs))
        times.inductor = time.perf_counter() - start
        return compiled

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        compiled: Callable[..., Any] = run_passes(gm, example_inputs, inner)
        times.passes = time.perf_counter() - start - times.inductor
        return compiled

    with config.patch(force_disable_caches=True):
        compile_wan(layers, backend)
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
