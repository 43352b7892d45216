"""Real pipelines of diffusers, tiny: every route at threshold 0 and at a plan, in every set-up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, Piped, far, made
from torch import nn

import freqopt

ROUTES = ("eager", "regional", "compile")
SPREAD = [
    ("wan_experts", "eager"),
    ("hunyuan", "eager"),
    ("flux", "eager"),
    ("cogvideox", "compile"),
]
"""Pairs that are run by default; the others are slow ones."""


def pairs() -> list[Any]:
    every = itertools.product(PIPELINES, ROUTES)
    return [pytest.param(*pair, marks=() if pair in SPREAD else pytest.mark.slow) for pair in every]


def optimized(piped: Piped, plans: Any, route: str) -> freqopt.Handle:
    return freqopt.optimize(piped.pipe, plans, route=route, inner="eager", strict=True)


@pytest.mark.parametrize(("name", "route"), pairs())
def test_exact_at_threshold_0_and_as_planned_elsewhere(name: str, route: str) -> None:
    piped = made(name)
    dense, zero, plans = piped.run(), piped.plans(0.0), piped.plans(1.0)
    assert all(plan.sites for plan in plans.values())
    with optimized(piped, zero, route):
        assert far(piped.run(), dense) < 1e-4
    with optimized(piped, plans, route) as handle:
        out = piped.run()
        other = piped.run(**piped.other)
        shown = str(handle)
    for component, plan in plans.items():
        assert component in shown and f"{len(plan.sites)} of {len(plan.sites)}" in shown
    assert torch.equal(piped.run(), dense)
    assert far(out, dense) > 1e-4
    if route != "eager":
        with optimized(piped, plans, "eager"):
            assert far(piped.run(), out) < 1e-4
            assert far(piped.run(**piped.other), other) < 1e-4


def casting(piped: Piped) -> None:
    for model in piped.models.values():
        model.half().float()  # what casting stores
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def first_block_cache(piped: Piped) -> None:
    from diffusers import FirstBlockCacheConfig

    for model in piped.models.values():
        model.enable_cache(FirstBlockCacheConfig(threshold=1.0))


def attention_broadcast(piped: Piped) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    for model in piped.models.values():
        model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 1001),  # the ends are left out
                current_timestep_callback=lambda: piped.pipe.current_timestep,
            )
        )


def offloading(piped: Piped) -> None:
    pytest.importorskip("accelerate")
    device = torch.device("cpu")
    for model in piped.models.values():
        model.enable_group_offload(device, device, offload_type="leaf_level")


def offloading_blocks(piped: Piped) -> None:
    pytest.importorskip("accelerate")
    device = torch.device("cpu")
    for model in piped.models.values():
        model.enable_group_offload(
            device, device, offload_type="block_level", num_blocks_per_group=1
        )


class Adapter(nn.Module):
    """A low-rank adapter beside a layer, not merged."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapters(piped: Piped, *, load: bool = True) -> None:
    for model in piped.models.values():
        for module in list(model.modules()):
            if isinstance(getattr(module, "to_q", None), nn.Linear if load else Adapter):
                module.to_q = Adapter(module.to_q) if load else module.to_q.base_layer


SETUPS: dict[str, Callable[[Piped], None]] = {
    set_up.__name__: set_up
    for set_up in (
        casting,
        first_block_cache,
        attention_broadcast,
        offloading,
        offloading_blocks,
        adapters,
    )
}
CACHES = {"first_block_cache", "attention_broadcast"}
STEPS = 4
"""Denoising steps, of which caches skip some."""

LEFT = {("wan", "offloading"), ("wan_experts", "offloading")}
"""Where hooks leave no attention in a graph of a whole model, which is said."""

QUICK = {
    ("wan", "first_block_cache", "auto"),
    ("wan_experts", "attention_broadcast", "auto"),
    ("cogvideox", "casting", "auto"),
    ("hunyuan", "attention_broadcast", "auto"),
    ("ltx", "first_block_cache", "auto"),
    ("flux", "offloading", "auto"),
    ("wan", "offloading_blocks", "regional"),
    ("ltx", "attention_broadcast", "regional"),
    ("wan_experts", "offloading", "compile"),
}


def set_ups() -> list[Any]:
    every = itertools.product(PIPELINES, SETUPS, ("auto", "regional", "compile"))
    return [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in every]


def split_calls() -> int:
    """How often attention was split since the counters were reset."""
    return sum(site.calls for site in freqopt.counters().sites if site.split)


def ran(piped: Piped, plans: Any, route: Any) -> tuple[torch.Tensor, int, set[str]]:
    """The output at some plans, how often attention was split for it, and the routes taken."""
    torch._dynamo.reset()
    with freqopt.optimize(piped.pipe, plans, route=route, inner="eager", strict=True) as handle:
        freqopt.reset_counters()
        out = piped.run(num_inference_steps=STEPS)
        routes = {part.choice.route for part in handle.components.values()}
        return out, split_calls(), routes


@pytest.mark.parametrize(("name", "set_up", "route"), set_ups())
def test_what_is_on_a_model_changes_nothing(name: str, set_up: str, route: str) -> None:
    piped = made(name)
    zero, plans = piped.plans(0.0), piped.plans(1.0)
    every = ran(piped, plans, "eager")[1]
    torch.manual_seed(1)
    SETUPS[set_up](piped)
    dense = piped.run(num_inference_steps=STEPS)
    if route == "compile" and (name, set_up) in LEFT:
        with pytest.raises(freqopt.SiteError, match="0 of 2 planned sites split.*a hook"):
            ran(piped, plans, route)
        return
    out, calls, routes = ran(piped, plans, route)
    assert routes == {"eager" if route == "auto" else route}
    assert calls < every if set_up in CACHES else calls == every
    assert far(out, dense) > 1e-4
    assert torch.equal(piped.run(num_inference_steps=STEPS), dense)
    if route == "auto":
        assert far(ran(piped, zero, route)[0], dense) < 1e-4
    else:  # which is exact at threshold 0
        expected, as_often, _ = ran(piped, plans, "eager")
        assert far(out, expected) < 1e-5 and calls == as_often


def test_adapters_come_and_go_while_it_is_optimized() -> None:
    piped = made("wan")
    plans = piped.plans(1.0)
    with freqopt.optimize(piped.pipe, plans, route="eager", strict=True):
        before = piped.run()
        torch.manual_seed(1)
        adapters(piped)
        adapted = piped.run()
        adapters(piped, load=False)
        assert torch.equal(piped.run(), before) and far(adapted, before) > 1e-4


@pytest.mark.parametrize("route", ["eager", "regional"])
def test_a_model_that_was_given_the_name_by_hand_is_optimized(route: str) -> None:
    piped = made("wan")
    plans = piped.plans(1.0)
    with optimized(piped, plans, route):
        expected = piped.run()
    piped.pipe.transformer.set_attention_backend("freqopt")
    try:
        with optimized(piped, plans, route):
            assert far(piped.run(), expected) < 1e-6
    finally:
        piped.pipe.transformer.set_attention_backend("native")


def test_a_chosen_backend_is_replaced_and_put_back() -> None:
    piped = made("wan")
    plans = piped.plans(1.0)
    with freqopt.optimize(piped.pipe, plans, route="eager"):
        expected = piped.run()
    piped.pipe.transformer.set_attention_backend("flex")
    try:
        chosen = [b.attn1.processor._attention_backend for b in piped.pipe.transformer.blocks]
        with freqopt.optimize(piped.pipe, plans, route="eager", strict=True):
            mine = piped.pipe.transformer.blocks[0].attn1.processor._attention_backend
            assert mine.value == "freqopt"
        assert [
            b.attn1.processor._attention_backend for b in piped.pipe.transformer.blocks
        ] == chosen
    finally:
        piped.pipe.transformer.set_attention_backend("native")
    with pytest.raises(freqopt.OptionError, match="no plan is on the model"):
        piped.pipe.transformer.set_attention_backend("freqopt")
        piped.run()
    piped.pipe.transformer.set_attention_backend("native")
    with freqopt.optimize(piped.pipe, plans, route="eager"):
        assert torch.equal(piped.run(), expected)


@pytest.mark.slow
def test_two_experts_are_calibrated_saved_and_read(tmp_path: Path) -> None:
    piped = made("wan_experts")
    call = {**piped.call, "num_inference_steps": 4}
    handle = freqopt.optimize(
        piped.pipe,
        prompts=[call],
        target_density=0.7,
        route="eager",
        calibration={"rounds": 0, "progress": False, "order": "grid", "timestep_buckets": 1},
    )
    out = piped.run(num_inference_steps=4)
    handle.save(tmp_path)
    handle.disable()
    with freqopt.optimize(piped.pipe, str(tmp_path), route="eager"):
        assert torch.equal(piped.run(num_inference_steps=4), out)
    found = freqopt.Plans.from_pretrained(tmp_path)
    low, high = (found[n].timestep_range for n in ("transformer_2", "transformer"))
    assert low is not None and high is not None and low[1] < high[0]
