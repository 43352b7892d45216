"""Forward and backward of the op beside dense attention: `python -m benchmarks.backward`.

The gradients are compared with those of plain PyTorch in float32 on one head, route and
coefficients equal, before a time is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import DENSE, GRIDS, threshold_for
from benchmarks.common import environment, milliseconds, write
from benchmarks.tensors import Attention, zoo_attention

GATE = 2e-2
"""Largest relative L2 error of a gradient for which a time is printed."""


class Prepared(NamedTuple):
    """A forward that has run, and its backward pass alone."""

    route: Tensor
    coefficients: Tensor
    matrix: Tensor
    backward: Callable[[], tuple[Tensor, Tensor, Tensor]]


def inputs_of(a: Attention) -> Any:
    """The call's tensors as the backward pass takes them."""
    from freqopt.kernels.layout import Inputs, TokenLayout

    thresholds = a.query.new_zeros(a.query.shape[1], dtype=torch.float32)
    return Inputs(a.query, a.key, a.value, thresholds, None, TokenLayout(a.grid, 0, 0))


def prepare(a: Attention, grad: Tensor, threshold: float) -> Prepared:
    """Run the forward."""
    from freqopt.kernels.backward import launch
    from freqopt.kernels.op import split_attention_op

    scale = a.query.shape[-1] ** -0.5
    thresholds = torch.full((a.query.shape[1],), threshold, device=a.query.device)
    out, _, _, route, coefficients, *_, matrix = split_attention_op(
        *a[:3], thresholds, None, list(a.grid), 0, 0, scale, 0.0, 64
    )

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        found = launch.Forward(out, route, coefficients, matrix)
        return launch.split_backward(grad, None, inputs_of(a), found, scale)

    return Prepared(route, coefficients, matrix, backward)


def gradient_errors(a: Attention, grad: Tensor, prepared: Prepared) -> dict[str, float]:
    """Relative L2 error of each gradient of the first head, against float32."""
    from freqopt.kernels.chunked import Orders
    from freqopt.kernels.chunked_backward import Gradients, split_backward

    q, k, v, g = (x[:, :1].float() for x in (a.query, a.key, a.value, grad))
    inputs = inputs_of(a)._replace(query=q, key=k, value=v)
    truth = split_backward(
        Gradients(g, None),
        inputs,
        Orders(None, None),
        prepared.route[:, :1],
        prepared.coefficients[:, :1],
        prepared.matrix[:, :1],
        q.shape[-1] ** -0.5,
    )
    return {
        name: float((mine[:, :1].float() - true).norm() / true.norm())
        for name, mine, true in zip(
            ("query", "key", "value"), prepared.backward(), truth, strict=True
        )
    }


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the GPU of each of our kernels, and of PyTorch's together, longest first."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type.name != "CUDA":
            continue
        ours = event.key.endswith("_kernel") and "::" not in event.key
        name = event.key if ours else "PyTorch"
        times[name] = times.get(name, 0.0) + event.self_device_time_total / 1000
    return dict(sorted(times.items(), key=lambda entry: -entry[1]))


def extra_bytes(call: Callable[[], object]) -> int:
    """Most memory that a call holds beside what was there before, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def times_of(a: Attention, grad: Tensor, threshold: float) -> tuple[float, dict[str, float]]:
    """Milliseconds of forward + backward: ours, and of each dense backend."""
    import freqopt

    leaves = [x.detach().requires_grad_() for x in a[:3]]

    def split() -> object:
        out = freqopt.split_attention(*leaves, grid=a.grid, threshold=threshold)
        return torch.autograd.grad(out, leaves, grad)

    def dense() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)

    def timed(backend: SDPBackend) -> float:
        with sdpa_kernel(backend):
            return milliseconds(dense)

    return milliseconds(split), {name: timed(backend) for name, backend in DENSE.items()}


def main() -> None:
    """Measure one problem; writes backward.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="32K", choices=GRIDS)
    parser.add_argument("--density", type=float, default=0.10)
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here: this benchmark needs an NVIDIA GPU")
    a = zoo_attention(GRIDS[arguments.size])
    grad = torch.randn_like(a.query)
    threshold = threshold_for(a, arguments.density)
    prepared = prepare(a, grad, threshold)
    errors = gradient_errors(a, grad, prepared)
    shown = "  ".join(f"{name} {error:.2e}" for name, error in errors.items())
    if not all(error <= GATE for error in errors.values()):
        raise SystemExit(f"FAILED its gate (relative L2 {shown}, at most {GATE}); no time reported")
    ours, dense = times_of(a, grad, threshold)
    speedup = min(dense.values()) / ours
    alone, parts = milliseconds(prepared.backward), kernel_times(prepared.backward)
    extra = extra_bytes(prepared.backward)
    result: dict[str, Any] = {
        "environment": environment(),
        "tokens": a.query.shape[2],
        "heads": a.query.shape[1],
        "head_dim": a.query.shape[3],
        "density": arguments.density,
        "threshold": threshold,
        "gradient_l2": errors,
        "ms": ours,
        "dense_ms": dense,
        "speedup": speedup,
        "backward_ms": alone,
        "backward_parts_ms": parts,
        "backward_extra_bytes": extra,
    }
    print(f"{a.query.shape[1]} heads x {a.query.shape[2]} tokens, density {arguments.density}")
    print(f"forward + backward {ours:.2f} ms, {speedup:.2f}x dense; gradients' L2 error: {shown}")
    print("dense: " + ", ".join(f"{name} {time:.2f} ms" for name, time in dense.items()))
    print(f"backward {alone:.2f} ms, {extra / 2**30:.2f} GiB beside its inputs; of it:")
    print(", ".join(f"{name} {time:.2f}" for name, time in parts.items()))
    print(f"wrote {write('backward', result, arguments.out)}")


if __name__ == "__main__":
    main()
