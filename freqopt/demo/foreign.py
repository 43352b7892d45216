"""The demo's second half: a model class that is not ours is rewritten and still agrees.

diffusers' Wan transformer, small and with random weights. Those have no spectrum worth calibrating,
so the budget is 0 (everything exact), where the rewritten model must equal the eager one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import freqopt

GRID = (3, 10, 14)
TEXT_LENGTH = 7


@dataclass(frozen=True)
class Foreign:
    """Outcome of the comparison. max_error, max_output: largest absolute difference and output.

    relative_error: L2. sites: found; split: those rewritten; calls: of the op in one forward pass.
    """

    model: str
    grid: tuple[int, int, int]
    sites: int
    split: int
    calls: int
    max_error: float
    max_output: float
    relative_error: float


def diffusers_installed() -> bool:
    """Whether the comparison can be made here."""
    return importlib.util.find_spec("diffusers") is not None


def compare_foreign(device: torch.device, inner: str, *, seed: int = 0) -> Foreign:
    """Compile a random `WanTransformer3DModel` at threshold 0 and compare it with itself, eager."""
    model = make_model(device, seed)
    inputs = make_inputs(device, seed)
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = freqopt.inspect(model, min_tokens=1, **inputs)
        options: dict[str, Any] = {"threshold": 0.0, "min_tokens": 1, "strict": True}
        options["inner"] = inner
        compiled = torch.compile(model, backend="freqopt", options=options)
        compiled(**inputs)
        got, calls = counted(compiled, inputs)
    difference = (got[0].double() - expected.double()).abs()
    return Foreign(
        model=type(model).__name__,
        grid=GRID,
        sites=len(found.sites),
        split=sum(site.decision == "split" for site in found.sites),
        calls=calls,
        max_error=float(difference.max()),
        max_output=float(expected.abs().max()),
        relative_error=float(difference.norm() / expected.double().norm()),
    )


def make_model(device: torch.device, seed: int) -> nn.Module:
    """The class as diffusers has it, with every all-zero parameter refilled so that each counts."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=128,
            num_layers=3,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        for parameter in model.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.05)
    return model.to(device).eval()


def make_inputs(device: torch.device, seed: int) -> dict[str, Any]:
    """Keyword arguments for a latent video of GRID patches."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = GRID
    return {
        "hidden_states": torch.randn(
            1, 4, t, 2 * h, 2 * w, generator=generator, dtype=torch.float32
        ).to(device),
        "timestep": torch.tensor([500.0], device=device, dtype=torch.float32),
        "encoder_hidden_states": torch.randn(
            1, TEXT_LENGTH, 32, generator=generator, dtype=torch.float32
        ).to(device),
        "return_dict": False,
    }


def counted(model: Callable[..., Any], inputs: dict[str, Any]) -> tuple[tuple[Tensor, ...], int]:
    """The model's output, and how many times the op ran to make it."""
    from torch.autograd.profiler_legacy import profile  # the other one writes to the terminal

    with profile() as trace:
        output = model(**inputs)
    calls = sum(e.count for e in trace.key_averages() if e.key == "freqopt::split_attention")
    return (output if isinstance(output, tuple) else (output,)), calls
