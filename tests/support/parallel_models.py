"""Tiny models of diffusers for tests on several ranks, and plans whose heads all differ."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from plans import plan_of
from torch import Tensor, nn

from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget

LOUD = {"min_tokens": 0, "inner": "eager"}
GRID = (3, 6, 10)


def wan(heads: int = 4, layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """A Wan transformer and a call over GRID, the same on all ranks."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()
    t, h, w = GRID
    call = {
        "hidden_states": torch.randn(1, 4, t, 2 * h, 2 * w),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 4, 16),
        "return_dict": False,
    }
    return _loud(model), call


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """A Flux transformer and a call over 8 tokens of text and (1, 16, 20) of an image."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    ids = torch.zeros(16, 20, 3)
    ids[..., 1] += torch.arange(16)[:, None]
    ids[..., 2] += torch.arange(20)
    call = {
        "hidden_states": torch.randn(1, 320, 4),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
    return _loud(model), call


def _loud(model: nn.Module) -> nn.Module:
    """Weights so large that attention is far from even, and heads differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                size = parameter.shape
                parameter.copy_(1.0 + 2.0 * torch.rand(size, generator=generator))
            elif not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def uneven_plan(model: nn.Module, call: dict[str, Any], **grids: Any) -> Plan:
    """A plan in which every head has another threshold, and every other one an order by content."""
    plan = plan_of(model, call, 1.0, **grids)
    sites = {}
    for number, (name, site) in enumerate(plan.sites.items()):
        thresholds = [0.2 * 4.0 ** ((head + number) % site.heads) for head in range(site.heads)]
        chunks = [256 * (head % 2) for head in range(site.heads)]
        budgets = [Budget(threshold=thresholds)]
        sites[name] = site.model_copy(update={"budgets": budgets, "chunks": chunks})
    return plan.model_copy(update={"sites": sites})


def turned(plan: Plan) -> Plan:
    """The plan with every site's rows in reverse: budgets on wrong heads."""
    sites = {
        name: site.model_copy(
            update={
                "budgets": [Budget(threshold=b.threshold[::-1]) for b in site.budgets],
                "chunks": site.chunks[::-1],
            }
        )
        for name, site in plan.sites.items()
    }
    return plan.model_copy(update={"sites": sites})


def one_accelerator() -> None:
    """diffusers divides by their number, which is 0 on a CPU."""
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]


def share_out(model: nn.Module, call: dict[str, Any] | None = None, **degrees: int) -> None:
    """diffusers' `enable_parallelism`, and a call, in which its hooks set themselves up."""
    from diffusers import ContextParallelConfig

    one_accelerator()
    model.enable_parallelism(config=ContextParallelConfig(**degrees))  # type: ignore[operator]
    if call is not None:
        model(**call)


def compiled(model: nn.Module, call: dict[str, Any], **options: Any) -> Tensor:
    """What the model returns, compiled as a whole."""
    torch._dynamo.reset()
    run = torch.compile(model, backend="freqopt", options={**LOUD, **options})
    found: Tensor = run(**call)[0]
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()
