"""Queries of one rank over the keys of all: gathered, or passed around. Heads need not divide."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import build
from model_cases_packed import LTX, ltx_inputs
from parallel_models import compiled, ranks, relative, share_out, uneven_plan, wan
from ranks import Ranks
from torch import Tensor

import freqopt
from freqopt.errors import InputError, SiteError
from freqopt.parallel import attention_over_ranks, over_all_keys
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget

METHODS = ("gather", "ring")
GRID, HEADS, KEY_HEADS, DIM = (4, 8, 16), 3, 1, 16
BEFORE, AFTER = 5, 3


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as found:
        yield found


def tensors(text: bool) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Query, key and value of all tokens, those of this rank, and key masks of both."""
    rank, count = ranks()
    t, h, w = GRID
    video, generator = t * h * w // count, torch.Generator().manual_seed(3)
    lengths = [BEFORE, video, AFTER] if text else [video]
    tokens = sum(lengths)
    at = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")).flatten(1)
    waves = torch.stack([(at.float() * k).sum(0) for k in (0.3, 0.7)]).repeat(DIM // 2, 1).t()
    whole = []
    for heads in (HEADS, KEY_HEADS, KEY_HEADS):
        x = torch.randn(2, heads, count * tokens, DIM, generator=generator)
        for r in range(count):  # neighbours are alike, so that a split has something to leave out
            start = r * tokens + (BEFORE if text else 0)
            x[:, :, start : start + video] += 3.0 * waves[r * video : (r + 1) * video].sin()
        whole.append(x)
    mask = torch.rand(2, count * tokens, generator=generator) > 0.5
    for r in range(count):
        start = r * tokens + (BEFORE if text else 0)
        mask[:, start : start + video] = True
    part = slice(rank * tokens, (rank + 1) * tokens)
    return whole, [x[:, :, part] for x in whole], mask, mask[:, part]


def _ends(mask: Tensor, lengths: tuple[int, ...], count: int) -> Tensor:
    """A mask of all tokens, text of all ranks at either end."""
    parts = mask.unflatten(1, (count, -1)).split(lengths, 2)
    return torch.cat([part.flatten(1, 2) for part in parts], 1)


def over_ranks(method: str, text: bool) -> dict[str, float]:
    whole, mine, mask, own_mask = tensors(text)
    rank, count = ranks()
    bias = mask[:, None, None] if text else None
    dense = F.scaled_dot_product_attention(*whole, attn_mask=bias, enable_gqa=True)
    dense = dense.chunk(count, 2)[rank]
    options: dict[str, Any] = {"method": method, "grid": GRID}
    if text:
        options |= {"text_before": BEFORE, "text_after": AFTER, "key_mask": own_mask}
    t, h, w = GRID
    first, last = (count * BEFORE, count * AFTER) if text else (0, 0)
    parts = [x.unflatten(2, (count, -1)) for x in whole]
    lengths = (BEFORE, t * h * w // count, AFTER) if text else (0, t * h * w // count, 0)
    ordered = [torch.cat([p.flatten(2, 3) for p in x.split(lengths, 3)], 2) for x in parts]
    keys = _ends(mask, lengths, count) if text else None
    of_one = freqopt.split_attention(
        *ordered, grid=GRID, text_before=first, text_after=last, density=0.4, key_mask=keys
    )
    exact = F.scaled_dot_product_attention(
        *ordered, attn_mask=None if keys is None else keys[:, None, None], enable_gqa=True
    )
    by_one = relative(of_one, exact)
    found = {
        "zero": attention_over_ranks(*mine, threshold=0.0, **options),
        "exact": attention_over_ranks(*mine, exact=True, **options),
        "grid": attention_over_ranks(*mine, density=0.4, **options),
        "content": attention_over_ranks(*mine, density=0.4, order="content", **options),
        "mixed": attention_over_ranks(
            *mine, threshold=0.0, order=torch.tensor([256] * KEY_HEADS), **options
        ),
    }
    return {"one": by_one} | {n: relative(x, dense) for n, x in found.items()}


@pytest.mark.parametrize("text", [False, True], ids=["video", "text"])
@pytest.mark.parametrize("method", METHODS)
def test_all_keys_are_reached(two: Ranks, method: str, text: bool) -> None:
    for found in two.call(over_ranks, method, text):
        assert max(found["zero"], found["exact"], found["mixed"]) < 1e-5
        assert 0.3 * found["one"] < found["grid"] < 1.5 * found["one"]
        assert found["content"] < 1.5 * found["one"]


def one_graph() -> float:
    _, mine, _, _ = tensors(False)
    call = {"grid": GRID, "density": 0.4}
    wanted = attention_over_ranks(*mine, **call)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_over_ranks(q, k, v, **call)

    with torch.no_grad():
        return relative(torch.compile(run, backend="eager", fullgraph=True)(*mine), wanted)


def test_gathering_is_a_part_of_a_graph(two: Ranks) -> None:
    assert max(two.call(one_graph)) < 1e-6


def refused() -> list[str]:
    _, mine, _, _ = tensors(False)
    said = []
    for options in (
        {"method": "alltoall"},
        {"grid": (4, 8, 15)},
        {"grid": GRID, "text_before": 600},
    ):
        with pytest.raises(InputError) as error:
            attention_over_ranks(*mine, **options)
        said.append(str(error.value))
    mine[0].requires_grad_()
    with pytest.raises(InputError) as error:
        attention_over_ranks(*mine, grid=GRID)
    return [*said, str(error.value)]


def test_what_cannot_be_is_said(two: Ranks) -> None:
    (method, grid, text, gradients), _ = two.call(refused)
    assert "'gather' and 'ring'" in method and "grid of all ranks together" in grid
    assert "leave no tokens" in text and "torch.no_grad" in gradients


def wan_ring(method: str) -> dict[str, float]:
    """Three heads on two ranks."""
    with torch.no_grad():
        model, call = wan(heads=3)
        dense = model(**call)[0]
        plan = uneven_plan(model, call)
        alone = compiled(model, call, plan=plan)
        share_out(model, ring_degree=2)
        found = {}
        with over_all_keys(model, plan, method=method):  # type: ignore[arg-type]
            found["split"] = relative(model(**call)[0], dense)
        with over_all_keys(model, method=method, threshold=0.0, grid=(3, 6, 10)):  # type: ignore[arg-type]
            found["exact"] = relative(model(**call)[0], dense)
        processors = [block.attn1.processor._parallel_config for block in model.blocks]
        assert all(config is not None for config in processors)
        for block in model.blocks:
            block.attn1.processor._parallel_config = None
        return found | {"alone": relative(alone, dense), "local": relative(model(**call)[0], dense)}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_heads_that_do_not_divide(two: Ranks, method: str) -> None:
    for found in two.call(wan_ring, method):
        assert found["exact"] < 1e-5
        assert found["alone"] > 1e-3 and 1e-3 < found["split"] < 0.5 * found["local"]


def wan_in_blocks(method: str) -> dict[str, Any]:
    """Blocks compiled, beside eager mode: both with a plan of two timesteps' budgets."""
    graphs: list[Any] = []

    def counting(gm: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in gm.graph.nodes])
        return gm

    with torch.no_grad():
        model, call = wan(heads=3, layers=4)
        plan = by_timestep(uneven_plan(model, call))
        share_out(model, ring_degree=2)
        calls = [call | {"timestep": torch.tensor([t])} for t in (500.0, 900.0)]
        with over_all_keys(model, plan, method=method):  # type: ignore[arg-type]
            eager = [model(**each)[0] for each in calls]
        with over_all_keys(model, plan, method=method, inner=counting):  # type: ignore[arg-type]
            found = [model(**each)[0] for each in calls]
            found += [model(**calls[0])[0]]
        left = [vars(m).get("freqopt_site_numbers") for m in model.modules()]
        hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
        with over_all_keys(model, plan, method=method):  # type: ignore[arg-type]
            again = model(**call)[0]
    return {
        "off": [relative(x, y) for x, y in zip(found, [*eager, eager[0]], strict=True)],
        "apart": relative(eager[0], eager[1]),
        "graphs": graphs,
        "left": [each for each in left if each] + ([hooks] if hooks else []),
        "again": relative(again, eager[0]),
    }


@pytest.mark.parametrize("method", METHODS)
def test_blocks_may_be_compiled(two: Ranks, method: str) -> None:
    for found in two.call(wan_in_blocks, method):
        assert max(found["off"]) < 1e-6 and found["again"] == 0.0
        assert found["apart"] > 1e-3
        assert len(found["graphs"]) == 2, "the first of four blocks has a hook of its own"
        for graph in found["graphs"]:
            assert sum("ask_owner" in node for node in graph) == 1
        assert not found["left"]


def by_timestep(plan: Plan) -> Plan:
    """A plan with other budgets above 700."""
    sites = {
        name: site.model_copy(
            update={"budgets": [*site.budgets, Budget(threshold=[3.0] * site.heads)]}
        )
        for name, site in plan.sites.items()
    }
    return plan.model_copy(
        update={"sites": sites, "timestep_name": "timestep", "timestep_edges": [700.0]}
    )


class Projected(torch.nn.Module):
    """One head of attention over (B, N, 16), by PyTorch's function or written by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.qkv, self.by_hand = torch.nn.Linear(16, 48), by_hand

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            found = (0.25 * q @ k.mT).softmax(-1) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v)
        return found.transpose(1, 2).flatten(2)


class InBlocks(torch.nn.Module):
    """Blocks whose attention is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Projected(by_hand=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def no_blocks() -> list[str]:
    said = []
    for model in (Projected(by_hand=False), InBlocks()):
        with pytest.raises(SiteError) as error, over_all_keys(model, threshold=1.0, inner="eager"):
            model(torch.randn(1, 128, 16))
        said.append(str(error.value))
    return said


def test_what_cannot_be_compiled_is_said(two: Ranks) -> None:
    for outside, by_hand in two.call(no_blocks):
        assert "the model itself is in no block" in outside and "leave out inner=" in outside
        assert "not computed by scaled_dot_product_attention" in by_hand


TALL = (3, 10, 6)


def tall(name: str) -> set[Any]:
    """Grids that attention has in a call of another aspect than the plan's, of as many tokens."""
    if name == "ltx":
        model, call = build("LTXVideoTransformer3DModel", **LTX), ltx_inputs((3, 6, 10), 1)
        call |= {key: call[key][:, :6] for key in call if key.startswith("encoder_")}
        other = call | {"height": TALL[1], "width": TALL[2]}
    else:
        model, call = wan()
        other = call | {"hidden_states": torch.randn(1, 4, TALL[0], 2 * TALL[1], 2 * TALL[2])}
    plan = uneven_plan(model, call)
    share_out(model, ring_degree=2)
    met = set()

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        met.add(kwargs["grid"])
        return attention_over_ranks(*args, **kwargs)

    all_keys = importlib.import_module("freqopt.parallel.all_keys")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), over_all_keys(model, plan):
        patch.setattr(all_keys, "attention_over_ranks", spy)
        model(**other)
    return met


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_another_aspect_has_the_grid_that_its_call_tells(two: Ranks, name: str) -> None:
    assert two.call(tall, name) == [{TALL}, {TALL}]


def shared_heads() -> str:
    model, call = wan()
    with torch.no_grad():
        plan = uneven_plan(model, call)
        share_out(model, ulysses_degree=2)
    with pytest.raises(InputError, match="it has its own"), over_all_keys(model, plan, density=0.1):
        pass
    with pytest.raises(InputError) as error, over_all_keys(model, threshold=0.0):
        pass
    return str(error.value)


def test_a_model_that_shares_out_heads_is_refused(two: Ranks) -> None:
    assert "ulysses_degree" in two.call(shared_heads)[0]
