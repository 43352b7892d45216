"""Weights that are shared out: whole again where attention is (FSDP2), or by heads (tensors)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parallel_models import (
    LOUD,
    compiled,
    flux,
    one_accelerator,
    relative,
    turned,
    uneven_plan,
    wan,
)
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import freqopt


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def by_blocks(model: Any, plan: freqopt.Plan, call: dict[str, Any], blocks: Any) -> torch.Tensor:
    torch._dynamo.reset()
    with freqopt.attach(model, plan):
        for block in blocks:
            block.compile(backend="freqopt", options={**LOUD, "strict": True})
        found: torch.Tensor = model(**call)[0]
    return found


def fsdp() -> dict[str, float]:
    with torch.no_grad():
        model, call = wan()
        plan, dense = uneven_plan(model, call), model(**call)[0]
        alone = compiled(model, call, plan=plan)
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = by_blocks(model, plan, call, model.blocks)
    return {"split": relative(alone, dense), "found": relative(found, alone)}


def test_fully_sharded_weights(two: Ranks) -> None:
    for found in two.call(fsdp):
        assert found["found"] < 1e-6 and found["split"] > 1e-3


def tensor_parallel() -> dict[str, float]:
    """Every rank has the weights of its heads, as diffusers shares them out."""
    from diffusers.hooks import tensor_parallel
    from diffusers.models._modeling_parallel import TensorParallelConfig

    with torch.no_grad():
        model, call = flux()
        plan = uneven_plan(model, call, likely=((1, 16, 20),), believed=True)
        dense, alone = model(**call)[0], compiled(model, call, plan=plan)
        wrong = compiled(model, call, plan=turned(plan))
        one_accelerator()
        tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
        config = TensorParallelConfig(mesh=init_device_mesh("cpu", (2,)))
        model.enable_parallelism(config=config)
        shared = model(**call)[0]
        found = compiled(model, call, plan=plan, strict=True)
    return {
        "split": relative(alone, dense),
        "mistake": relative(wrong, alone),
        "dense": relative(shared, dense),
        "found": relative(found, alone),
    }


def test_weights_of_some_heads(two: Ranks) -> None:
    for found in two.call(tensor_parallel):
        assert found["dense"] < 1e-5 and found["found"] < 1e-5
        assert found["split"] > 1e-3 and found["mistake"] > 1e-3
