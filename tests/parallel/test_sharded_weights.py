"""Weights that are shared out: whole again where attention is (FSDP2), or by heads (tensors).

And ranks that share nothing, one branch of guidance each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_models import (
    LOUD,
    compiled,
    flux,
    one_accelerator,
    ranks,
    relative,
    share_out,
    turned,
    uneven_plan,
    wan,
)
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import freqopt
from freqopt.plan.plan import model_fingerprint

QUICK: dict[str, Any] = {"rounds": 0, "passes": 8, "progress": False, "target_density": 0.7}


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


def shared_out(model: Any, call: dict[str, Any], ulysses: bool) -> None:
    """FSDP2; ulysses: the ranks that share weights share the sequence as well."""
    if ulysses:
        share_out(model, call, ulysses_degree=2)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@functools.cache
def of_one() -> tuple[freqopt.Plan, torch.Tensor, torch.Tensor]:
    """A plan, and outputs of one rank: dense, and by the plan."""
    model, call = wan()
    plan, dense = uneven_plan(model, call), model(**call)[0]
    return plan, dense, compiled(model, call, plan=plan)


def fsdp(ulysses: bool) -> dict[str, float]:
    with torch.no_grad():
        plan, dense, alone = of_one()
        model, call = wan()
        shared_out(model, call, ulysses)
        return {
            "split": relative(alone, dense),
            "whole": relative(compiled(model, call, plan=plan, strict=True), alone),
            "by blocks": relative(by_blocks(model, plan, call, model.blocks), alone),
        }


@pytest.mark.parametrize("ulysses", [False, True], ids=["alone", "ulysses"])
def test_fully_sharded_weights(two: Ranks, ulysses: bool) -> None:
    for found in two.call(fsdp, ulysses):
        assert found["whole"] < 1e-5 and found["by blocks"] < 1e-5 and found["split"] > 1e-3


def calibrated_fsdp() -> tuple[bool, bool, list[int]]:
    model, call = wan(layers=1)
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        shared_out(model, call, ulysses=True)
    plan = freqopt.calibrate(model, [call], **QUICK)
    of_class = plan.model.class_name == "WanTransformer3DModel"
    return of_class, plan.model.fingerprint == fingerprint, [s.heads for s in plan.sites.values()]


def test_a_plan_of_sharded_weights_is_one_of_the_model(two: Ranks) -> None:
    """`fully_shard` gives the model another class, and its parameters parts."""
    assert two.call(calibrated_fsdp) == [(True, True, [4])] * 2


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


def guidance() -> dict[str, float]:
    """A branch of guidance on each rank; their outputs are put together."""
    with torch.no_grad():
        model, call = wan()
        plan = uneven_plan(model, call)
        generator = torch.Generator().manual_seed(5)
        text = call["encoder_hidden_states"]
        branches = [
            {**call, "encoder_hidden_states": each}
            for each in (text, torch.randn(text.shape, generator=generator))
        ]
        dense = [model(**each)[0] for each in branches]
        alone = [compiled(model, each, plan=plan) for each in branches]
        rank, count = ranks()
        found = {}
        for name, run in (
            ("whole", lambda: compiled(model, branches[rank], plan=plan, strict=True)),
            ("by blocks", lambda: by_blocks(model, plan, branches[rank], model.blocks)),
        ):
            mine = run()
            got = [torch.empty_like(mine) for _ in range(count)]
            dist.all_gather(got, mine)
            found[name] = relative(_guided(got), _guided(alone))
    return found | {
        "split": relative(_guided(alone), _guided(dense)),
        "mistake": relative(_guided(alone[::-1]), _guided(alone)),
    }


def _guided(branches: list[torch.Tensor]) -> torch.Tensor:
    return branches[1] + 5.0 * (branches[0] - branches[1])


def test_a_branch_of_guidance_on_each_rank(two: Ranks) -> None:
    for found in two.call(guidance):
        assert found["whole"] < 1e-5 and found["by blocks"] < 1e-5
        assert found["split"] > 1e-3 and found["mistake"] > 1e-3
