"""What no graph shows: attention stays dense with the reason, and `strict` raises.

torch's own `context_parallel` runs on CPUs once DTensors are told how attention there is shared
out; its ring kernels do not. diffusers' rings want log-sum-exps, which none of its backends returns
on a CPU: that they are refused is tested on a model that was not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from engines import WAYS, engine, waited_for
from parallel_models import LOUD, compiled, relative, share_out, turned, uneven_plan, wan
from plans import plan_of
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel, register_sharding

import freqopt
from freqopt.errors import InputError, SiteError
from freqopt.parallel import over_all_keys

WIDTH, HEADS, DIM = 32, 4, 8
DTENSORS = "its tensors are DTensors"
IN_THE_BACKGROUND = WAYS["filled"]._replace(to_heads=waited_for)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value (B, H, N, D)."""
        return tuple(
            f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )


class Attention(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Video(nn.Module):
    """Attention over a video, in a module of its own."""

    def __init__(self, attn: type[Projected] = Attention) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.attn = attn()

    def tokens_of(self, video: Tensor) -> Tensor:
        """(B, N, C)."""
        return self.patch(video).flatten(2).transpose(1, 2)

    def forward(self, video: Tensor) -> tuple[Tensor]:
        return (self.attn(self.tokens_of(video)),)


def all_keys_of_dtensors() -> None:
    """Attention of DTensors on a CPU: keys of all ranks, the queries of this one."""

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    def _share(q: Any, k: Any, v: Any, *others: Any, **named: Any) -> list[Any]:
        rest = [None] * (len(others) + len(named))
        return [([Shard(2)] * 2, [Shard(2), Replicate(), Replicate(), *rest])]


def raised(run: Callable[[], object]) -> str:
    with pytest.raises(Exception) as error:
        run()
    return f"{type(error.value).__name__}: {error.value}"


def in_context_parallel(whole: bool) -> dict[str, Any]:
    """whole: the plan is for as many tokens as all ranks have, not one."""
    all_keys_of_dtensors()
    torch.manual_seed(0)
    model, mesh = Video().eval(), init_device_mesh("cpu", (2,))
    video = torch.randn(2, 4, 8, 12, 20)
    half = video[:, :, :4].clone()  # as many tokens as a rank has, whatever the order of frames
    found: dict[str, Any] = {}
    with torch.no_grad():
        plan = plan_of(model, {"video": video if whole else half}, 0.5)
        before = torch.compile(model, backend="freqopt", options={**LOUD, "threshold": 0.5})
        found["split"] = relative(before(half)[0], model(half)[0])
        with context_parallel(mesh, buffers=[video], buffer_seq_dims=[2]):
            call = {"video": video}
            (wanted,) = model(**call)
            found["shape"] = tuple(video.shape)
            local = Video().eval()
            local.load_state_dict(model.state_dict())
            own = _local_attention(local, video)
            found["local"] = relative(own, wanted)
            found["compiled before"] = relative(before(video)[0], wanted)
            for options in ({"plan": plan}, {"threshold": 0.5}, {"grid": (4, 6, 10)}):
                name = f"compiled, {next(iter(options))}"
                found[name] = relative(compiled(model, call, **options), wanted)
                found[f"strict, {name}"] = raised(
                    lambda options=options: compiled(model, call, strict=True, **options)
                )
            found["inspected"] = [
                (site.decision, site.reason) for site in freqopt.inspect(model, **call).sites
            ]
            torch._dynamo.reset()
            with freqopt.attach(model, plan):
                model.attn.compile(backend="freqopt", options=LOUD)
                found["by blocks"] = relative(model(**call)[0], wanted)
            model.attn._compiled_call_impl = None
            handle = freqopt.optimize(model, plan=plan, route="eager")
            try:
                found["eager"] = relative(model(**call)[0], wanted)
                found["counted"] = str(freqopt.counters())
            finally:
                handle.disable()
            handle = freqopt.optimize(model, plan=plan, route="eager", strict=True)
            try:
                found["strict, eager"] = raised(lambda: model(**call))
            finally:
                handle.disable()
            found["all keys"] = raised(lambda: _over_all_keys(model, plan, call))
    return found


def _local_attention(model: Video, video: Tensor) -> Tensor:
    q, k, v = model.attn.heads_of(model.tokens_of(video))
    weights = (q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _over_all_keys(model: nn.Module, plan: freqopt.Plan, call: dict[str, Any]) -> None:
    with over_all_keys(model, plan):
        model(**call)


@pytest.mark.parametrize("whole", [True, False], ids=["plan of all", "plan of one"])
def test_context_parallel_of_torch(two: Ranks, whole: bool) -> None:
    for found in two.call(in_context_parallel, whole):
        assert found["shape"] == (2, 4, 4, 12, 20)
        assert found["split"] > 1e-3 and found["local"] > 1e-3
        dense = ["compiled before", "by blocks", "eager"]
        dense += [name for name in found if name.startswith("compiled,")]
        assert len(dense) == 6
        assert {name: found[name] < 1e-5 for name in dense} == dict.fromkeys(dense, True), found
        for name in [name for name in found if name.startswith("strict")]:
            assert "SiteError" in found[name] and DTENSORS in found[name], found[name]
        ((decision, reason),) = found["inspected"]
        assert decision == "dense" and DTENSORS in reason
        assert DTENSORS in found["counted"]
        assert found["all keys"].startswith("SiteError")


def waited_for_exchanges() -> dict[str, Any]:
    with torch.no_grad():
        model, call = engine()
        dense = model(**call)[0]
        plan = uneven_plan(model, call)
        model.run(IN_THE_BACKGROUND)
        found: dict[str, Any] = {
            "left": relative(compiled(model, call, plan=plan), dense),
            "strict": raised(lambda: compiled(model, call, plan=plan, strict=True)),
        }
        torch._dynamo.reset()
        with freqopt.attach(model, plan):
            for block in model.blocks:
                block.compile(backend="freqopt", options=LOUD)
            found["by blocks"] = relative(model(**call)[0], dense)
            found["counted"] = str(freqopt.counters())
        for block in model.blocks:
            block._compiled_call_impl = None
        with pytest.raises(SiteError) as error, _served(model, plan, strict=True):
            model(**call)
        found["eager"] = str(error.value)
    return found


@contextmanager
def _served(model: nn.Module, plan: freqopt.Plan, **options: Any) -> Iterator[None]:
    """Calls are answered without a compiler."""
    handle = freqopt.optimize(model, plan=plan, route="eager", **options)
    try:
        yield
    finally:
        handle.disable()


def test_heads_after_a_graph_break_are_not_guessed(two: Ranks) -> None:
    """Exchanges that are waited for break graphs: whose heads come after them no graph tells."""
    for found in two.call(waited_for_exchanges):
        assert found["left"] < 1e-5 and found["by blocks"] < 1e-5
        for told in (found["strict"], found["counted"], found["eager"]):
            assert "2 of the plan's 4 heads here" in told, told
        assert found["strict"].startswith("SiteError")


class Parts(Projected):
    """A ring: queries of one rank against each part of the keys, merged by their log sums."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        both = torch.cat([k.flatten(), v.flatten()])
        parts = collectives.all_gather_tensor(both, 0, dist.group.WORLD).chunk(2)
        outs, sums = [], []
        for part in parts:
            keys, values = (each.view_as(k) for each in part.chunk(2))
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, logsum = attend(q, keys, values)
            outs.append(out)
            sums.append(logsum)
        weights = torch.stack(sums).softmax(0)[..., None]
        return (torch.stack(outs) * weights).sum(0).transpose(1, 2).flatten(2)


class Ring(Video):
    """A rank's tokens in a ring."""

    def __init__(self) -> None:
        super().__init__(Parts)

    def forward(self, video: Tensor) -> tuple[Tensor]:
        return (self.attn(self.tokens_of(video).chunk(2, 1)[dist.get_rank()]),)


def ring_in_a_graph() -> dict[str, Any]:
    torch.manual_seed(0)
    model, call = Ring().eval(), {"video": torch.randn(2, 4, 6, 12, 20)}
    found: dict[str, Any] = {}
    with torch.no_grad():
        (wanted,) = model(**call)
        for grid in ((6, 6, 10), (3, 6, 10)):
            told = freqopt.inspect(model, **call, grid=grid)
            found[str(grid)] = [(site.decision, site.reason) for site in told.sites]
            options = {"grid": grid, "threshold": 0.5}
            found[f"left {grid}"] = relative(compiled(model, call, **options), wanted)
            found[f"strict {grid}"] = raised(
                lambda options=options: compiled(model, call, strict=True, **options)
            )
    return found


def test_parts_of_a_ring_stay_as_they_are(two: Ranks) -> None:
    """With the grid of all ranks, and with one that fits the tokens of this one."""
    for found in two.call(ring_in_a_graph):
        for grid in ((6, 6, 10), (3, 6, 10)):
            assert [decision for decision, _ in found[str(grid)]] == ["dense", "dense"]
            assert found[f"left {grid}"] < 1e-6
            assert found[f"strict {grid}"].startswith("SiteError")


def anything(heads: int) -> dict[str, Any]:
    """diffusers' Ulysses for heads and tokens that do not divide."""
    with torch.no_grad():
        model, call = wan(heads=heads)
        dense = model(**call)[0]
        plan = uneven_plan(model, call)
        alone = compiled(model, call, plan=plan)
        found: dict[str, Any] = {
            "split": relative(alone, dense),
            "mistake": relative(compiled(model, call, plan=turned(plan)), alone),
        }
        share_out(model, call, ulysses_degree=2, ulysses_anything=True)
        found["compiled"] = raised(lambda: compiled(model, call, plan=plan))
        with _served(model, plan, strict=True):
            found["eager"] = relative(model(**call)[0], alone)
        found["all keys"] = raised(lambda: _over_all_keys(model, plan, call))
    return found


@pytest.mark.parametrize("heads", [4, 5])
def test_ulysses_anything(two: Ranks, heads: int) -> None:
    """The compiler does not get through it; without one it is served, the last rank's heads too."""
    for found in two.call(anything, heads):
        assert found["split"] > 1e-3 and found["mistake"] > 1e-3 and found["eager"] < 1e-5
        assert "all_to_all_single_any" in found["compiled"]
        assert found["all keys"].startswith("InputError")


def ring_anything() -> str:
    model, call = wan(heads=3)
    plan = uneven_plan(model, call)
    with torch.no_grad():
        share_out(model, ring_degree=2, ring_anything=True)
        with pytest.raises(InputError) as error, over_all_keys(model, plan):
            pass
    return str(error.value)


def test_ring_anything_is_refused(two: Ranks) -> None:
    assert all("ring_anything" in said for said in two.call(ring_anything))
