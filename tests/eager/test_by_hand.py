"""Attention written by hand is split without a compiler, whatever hooks are around its layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.eager import by_hand
from freqopt.eager import serve as serving
from freqopt.eager.by_hand import Like, PutOff, Step
from freqopt.errors import InputError, SiteError
from freqopt.plan.plan import Plan

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


def transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.size(-1) ** -0.5
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous().transpose(1, 2)


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    empty = torch.empty(len(q), q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=q.shape[-1] ** -0.5)
    probs = scores.softmax(dim=-1)
    del scores
    return torch.bmm(probs.to(q.dtype), v).unflatten(0, heads)


class ByHand(models.Attention):
    """Attention without a call of attention. mix: how it is written; kept: its weights, or none."""

    mix: Mix = staticmethod(plainly)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys = x if context is None else context
        q, k, v = (
            linear(each).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
            for linear, each in ((self.q, x), (self.k, keys), (self.v, keys))
        )
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


def made(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> models.Video:
    monkeypatch.setattr(models, "Attention", ByHand)
    monkeypatch.setattr(ByHand, "mix", staticmethod(mix))
    model = models.make()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # which half precision holds
    return model


@contextmanager
def served(model: nn.Module, plan: Plan, *, strict: bool = True) -> Iterator[None]:
    handle = freqopt.optimize(model, plan, route="eager", strict=strict)
    try:
        yield
    finally:
        handle.disable()


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def compiled(model: nn.Module, plan: Plan) -> Tensor:
    torch._dynamo.reset()
    options = {"min_tokens": 0, "inner": "eager", "plan": plan}
    out: Tensor = torch.compile(model, backend=freqopt_backend, options=options)(**models.inputs())
    torch._dynamo.reset()
    return out


def as_it_is(model: nn.Module) -> None:
    """No hooks."""


def cast_by_diffusers(model: nn.Module) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_layerwise_casting(
        model, storage_dtype=torch.float16, compute_dtype=torch.float32, skip_modules_pattern=()
    )


def cast_by_hooks(model: nn.Module) -> None:
    """Hooks of somebody's own, which the compiler cannot trace either."""

    def widen(module: nn.Module, args: object) -> None:
        torch._dynamo.graph_break()
        module.to(torch.float32)

    def narrow(module: nn.Module, args: object, output: object) -> None:
        module.to(torch.float16)

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            module.to(torch.float16)
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


@pytest.mark.parametrize(
    ("mix", "change"),
    [
        (plainly, as_it_is),
        (plainly, cast_by_hooks),
        *((mix, cast_by_diffusers) for mix in (plainly, transformers, einsums, batched)),
    ],
)
@torch.no_grad()
def test_it_is_split_as_the_compiled_route_splits_it(
    mix: Mix, change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(mix, monkeypatch), models.inputs()
    dense = model(**inputs)
    plan, zero = plan_of(model, inputs, 1.0), plan_of(model, inputs, 0.0)
    assert len(plan.sites) == 3
    expected = compiled(model, plan)
    assert far(expected, dense) > 1e-3
    change(model)
    with served(model, plan):
        first, second = model(**inputs), model(**inputs)
    assert far(first, expected) < 1e-5 and torch.equal(first, second)
    with served(model, zero):
        assert far(model(**inputs), dense) < 1e-5
    assert torch.equal(model(**inputs), dense)


def filled(scores: Tensor, keys: Tensor) -> Tensor:
    return scores.masked_fill(~keys, float("-inf"))


def added(scores: Tensor, keys: Tensor) -> Tensor:
    return scores + torch.zeros_like(keys, dtype=scores.dtype).masked_fill(~keys, -1e9)


class Masked(models.Attention):
    """Attention to what is there. hide: how the rest is hidden, None for one call of attention."""

    hide: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        if self.hide is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            scores = scores if keys is None else self.hide(scores, keys)
            out = scores.softmax(-1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


class Joint(models.Video):
    """Attention to the video and a text, of which not all tokens may be there."""

    def forward(self, video: Tensor, text: Tensor, there: Tensor | None = None) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        tokens, keys = x.shape[1], None
        if there is not None:
            keys = torch.cat([there[:, :1].repeat(1, tokens), there], 1)[:, None, None]
        for block in self.blocks:
            x = x + block.attn(torch.cat([x, text], 1), keys)[:, :tokens]
        return self.head(x)


@pytest.mark.parametrize("looks", [4, 0])
@pytest.mark.parametrize("hide", [filled, added, None])
@torch.no_grad()
def test_a_mask_that_no_plan_knows_is_not_left_out(
    hide: Any, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no look at a call, what the plan says of its tokens is believed, and no more."""
    monkeypatch.setattr(serving, "MOST_LOOKS", looks)
    monkeypatch.setattr(models, "Attention", Masked)
    monkeypatch.setattr(Masked, "hide", hide and staticmethod(hide))
    monkeypatch.setattr(models, "Video", Joint)
    model, inputs = models.make(), models.inputs()
    plan = plan_of(model, inputs, 1.0)
    there = torch.ones(inputs["text"].shape[:2], dtype=torch.bool)
    there[:, 5:] = False
    masked = {**inputs, "there": there}
    dense = model(**masked)
    assert far(model(**inputs), dense) > 1e-3
    with served(model, plan):
        model(**inputs)
    with served(model, plan, strict=False):
        assert far(model(**masked), dense) < 1e-5
    with served(model, plan), pytest.raises(SiteError, match="its mask"):
        model(**masked)


class Keeping:
    """Attention that hands out its weights, to be read or not."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        self.weights.append(weights)
        return weights @ v


@torch.no_grad()
def test_weights_are_computed_only_if_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Keeping()
    model, inputs = made(mix, monkeypatch), models.inputs()
    plan = plan_of(made(plainly, monkeypatch), inputs, 0.0)
    monkeypatch.setattr(ByHand, "mix", mix)
    model(**inputs)
    dense = mix.weights[::2]  # every other one is of the text, which no plan splits
    mix.weights = []
    ran: list[Step] = []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda step: ran.append(step) or run(step))
    with served(model, plan):
        model(**inputs)
    kept = mix.weights[::2]
    assert len(kept) == 3 and all(by_hand.is_put_off(weights) for weights in kept)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(kept, dense, strict=True))
    before = len(ran)
    for weights, expected in zip(kept, dense, strict=True):
        torch.testing.assert_close(weights + 0, expected, atol=1e-5, rtol=1e-4)
    assert len(ran) == before + 9  # the product, its scaling and the softmax of three layers


def added_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores /= q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v


def queries_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    q.zero_()
    return scores.softmax(-1) @ v


def queries_rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    F.relu(q, inplace=True)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("mix", [added_in_place, queries_overwritten, queries_rectified])
@torch.no_grad()
def test_what_is_written_in_place_stays_dense_and_says_so(
    mix: Mix, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = made(plainly, monkeypatch), models.inputs()
    plan = plan_of(model, inputs, 1.0)
    dense = model(**inputs)
    monkeypatch.setattr(ByHand, "mix", staticmethod(mix))
    with served(model, plan, strict=False), caplog.at_level("INFO", "freqopt"):
        assert far(model(**inputs), dense) < 1e-5
    assert "0 of 3 planned sites split: no attention was met there" in caplog.text
    with served(model, plan), pytest.raises(SiteError, match="no attention was met there"):
        model(**inputs)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_gradients_and_inference_mode_leave_it_dense(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(plainly, monkeypatch), models.inputs()
    plan = plan_of(model, inputs, 1.0)
    with mode():
        dense = model(**inputs)
        with served(model, plan, strict=False):
            out = model(**inputs)
        assert torch.equal(out, dense)
        with served(model, plan), pytest.raises(SiteError, match="torch.inference_mode"):
            model(**inputs)


def test_what_is_trained_alone_has_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are frozen, and values, or what the scores are multiplied by, are not."""
    heat = nn.Parameter(torch.tensor(1.5))
    model = made(plainly, monkeypatch)
    plan = plan_of(model, models.inputs(), 0.0)
    model.requires_grad_(False)
    wanted = [heat, *(block.attn.v.weight.requires_grad_(True) for block in model.blocks)]
    inputs = models.inputs()
    monkeypatch.setattr(
        ByHand,
        "mix",
        staticmethod(lambda q, k, v: (q @ k.transpose(-2, -1) * 0.25 * heat).softmax(-1) @ v),
    )
    dense = torch.autograd.grad(model(**inputs).square().sum(), wanted)
    with served(model, plan, strict=False):
        found = torch.autograd.grad(model(**inputs).square().sum(), wanted)
    for got, expected in zip(found, dense, strict=True):
        torch.testing.assert_close(got, expected)


def put_off(query: Tensor, key: Tensor) -> PutOff:
    like = torch.empty(*query.shape[:-1], key.shape[-1])
    form = Like(like.shape, like.stride(), like.dtype, like.device)
    return PutOff(Step(torch.matmul, (query, key), {}), form, weighs=False)


def test_what_is_put_off_is_a_tensor_like_any_other() -> None:
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 4, 5)
    expected = query @ key
    assert put_off(query, key).shape == expected.shape and put_off(query, key).size(-1) == 5
    assert by_hand.is_put_off(put_off(query, key))
    for read in (
        lambda t: t.view(-1),
        lambda t: t[0, 1],
        lambda t: t.numpy(),
        lambda t: torch.cat([t, t]),
        lambda t: copy.deepcopy(t),
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: t.sum().item(),
        lambda t: F.softmax(t, -1),
        repr,
    ):
        found, wanted = read(put_off(query, key)), read(expected)
        assert type(found) is type(wanted)
        if isinstance(found, Tensor):
            assert torch.equal(found, wanted)
        else:
            assert str(found) == str(wanted)
    assert not by_hand.is_put_off(found)


def test_writing_into_it_changes_it_for_all_who_hold_it() -> None:
    scores = put_off(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 4, 5))
    like = Like(scores.shape, scores.stride(), scores.dtype, scores.device)
    doubled = PutOff(Step(torch.mul, (scores, 2), {}), like, weighs=False)
    alias = scores
    scores += 1
    assert float(alias.max()) == float(scores.max()) == 5
    assert float(doubled.max()) == 8  # of before


def test_an_operand_that_was_written_into_is_refused() -> None:
    query, key = torch.ones(1, 2, 5, 4), torch.ones(1, 2, 4, 5)
    scores = put_off(query, key)
    query.zero_()
    with pytest.raises(InputError, match="matmul reads was written into after the call"):
        scores.sum()
