"""Pipelines of diffusers as they are, around tiny random transformers; text comes as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_cases import build
from model_cases_packed import FLUX, LTX
from model_cases_video import COGVIDEOX, HUNYUAN
from model_cases_wan import WAN
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget
from freqopt.positions import grids_of_positions

TEXT = 7


@dataclass(frozen=True)
class Piped:
    """A pipeline, what it is called with, and the same at another resolution."""

    pipe: Any
    call: dict[str, Any]
    other: dict[str, Any]

    @property
    def models(self) -> dict[str, nn.Module]:
        """The modules that denoise."""
        names = ("transformer", "transformer_2")
        found = {name: getattr(self.pipe, name, None) for name in names}
        return {name: model for name, model in found.items() if model is not None}

    def run(self, **changes: Any) -> Tensor:
        """Latents that the pipeline makes, of the same noise each time."""
        torch.manual_seed(0)
        call = {**self.call, "output_type": "latent", "return_dict": False, **changes}
        with torch.no_grad():
            out: Tensor = self.pipe(**call)[0]
        return out

    def plans(self, threshold: float) -> dict[str, Plan]:
        """A plan for each model; every head of every site has a threshold of its own."""
        with torch.no_grad():
            recorded = {}
            hooks = []
            for name, model in self.models.items():
                keep = _keeper(recorded, name)
                hooks.append(model.register_forward_pre_hook(keep, with_kwargs=True))
            self.run()
            for hook in hooks:
                hook.remove()
        found = {}
        for name, model in self.models.items():
            known = next(iter(grids_of_positions((), recorded[name]).values()), None)
            given = {} if known is None else {"given": known}
            found[name] = plan_of(model, recorded[name], threshold, **given)
        return {name: _uneven(plan, name) for name, plan in found.items()}


def _keeper(into: dict[str, dict[str, Any]], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        into.setdefault(name, dict(kwargs))

    return keep


def _uneven(plan: Plan, name: str) -> Plan:
    sites = {}
    for site, planned in plan.sites.items():
        row = planned.budgets[0].threshold
        threshold = [x * (1 + 0.4 * head) for head, x in enumerate(row)]
        sites[site] = planned.model_copy(update={"budgets": [Budget(threshold=threshold)]})
    return plan.model_copy(update={"sites": sites, "component": name})


def _text(tokens: int = TEXT) -> Tensor:
    return torch.randn(1, tokens, 16)


def sharper(model: nn.Module) -> nn.Module:
    """Queries that are larger, so that a budget makes a difference."""
    for name, parameter in model.named_parameters():
        if name.endswith("to_q.weight"):
            parameter.data *= 4
    return model


def wan(experts: int = 1) -> Piped:
    diffusers = pytest.importorskip("diffusers")
    models = [sharper(build("WanTransformer3DModel", **WAN)) for _ in range(experts)]
    more = {"transformer_2": models[1], "boundary_ratio": 0.5} if experts > 1 else {}
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=models[0],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if experts == 1 else 1.0),
        **more,
    )  # fmt: skip
    call = {
        "prompt_embeds": _text(), "negative_prompt_embeds": _text(), "guidance_scale": 3.0,
        "num_frames": 9, "height": 96, "width": 160, "num_inference_steps": 2,
    }  # fmt: skip
    return Piped(pipe, call, {"height": 160, "width": 96})


def wan_experts() -> Piped:
    return wan(2)


def cogvideox() -> Piped:
    diffusers = pytest.importorskip("diffusers")
    config = COGVIDEOX | {"attention_head_dim": 16}
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None,
        transformer=sharper(build("CogVideoXTransformer3DModel", **config)),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": _text(), "negative_prompt_embeds": _text(), "guidance_scale": 3.0,
        "num_frames": 9, "height": 96, "width": 160, "num_inference_steps": 2,
    }  # fmt: skip
    return Piped(pipe, call, {"height": 160, "width": 96})


def hunyuan() -> Piped:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, vae=None, text_encoder_2=None, tokenizer_2=None,
        transformer=sharper(build("HunyuanVideoTransformer3DModel", **HUNYUAN)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    mask = torch.ones(1, TEXT, dtype=torch.int64)
    mask[:, 5:] = 0
    call = {
        "prompt_embeds": _text(), "pooled_prompt_embeds": torch.randn(1, 8),
        "prompt_attention_mask": mask, "num_frames": 9, "height": 96, "width": 160,
        "num_inference_steps": 2,
    }  # fmt: skip
    return Piped(pipe, call, {"height": 160, "width": 96})


def ltx() -> Piped:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.LTXPipeline(
        vae=None, text_encoder=None, tokenizer=None,
        transformer=sharper(build("LTXVideoTransformer3DModel", **LTX)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    call = {
        "prompt_embeds": _text(), "negative_prompt_embeds": _text(), "guidance_scale": 3.0,
        "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask,
        "num_frames": 17, "height": 192, "width": 320, "num_inference_steps": 2,
    }  # fmt: skip
    return Piped(pipe, call, {"height": 320, "width": 192})


def flux() -> Piped:
    diffusers = pytest.importorskip("diffusers")
    model = sharper(build("FluxTransformer2DModel", **FLUX, pooled_projection_dim=8))
    pipe = diffusers.FluxPipeline(
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
    call = {
        "prompt_embeds": _text(), "pooled_prompt_embeds": torch.randn(1, 8), "height": 224,
        "width": 352, "num_inference_steps": 2,
    }  # fmt: skip
    return Piped(pipe, call, {"height": 352, "width": 224})


PIPELINES: dict[str, Callable[[], Piped]] = {
    made.__name__: made for made in (wan, wan_experts, cogvideox, hunyuan, ltx, flux)
}


def made(name: str) -> Piped:
    """A pipeline by name, the same each time."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    freqopt.reset_counters()
    found = PIPELINES[name]()
    found.pipe.set_progress_bar_config(disable=True)
    return found


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())
