"""Masks over keys in the forms that models give them, where no graph shows what they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor

import freqopt
from freqopt.errors import SiteError

Form = Callable[[Tensor], Tensor]


class Masked(models.Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(models.Block):
    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.attn(torch.cat([x, text], 1), mask)[:, : x.shape[1]]


class Joint(models.Video):
    """Attention to the video and a text behind it, of which not all is there."""

    form: Form = staticmethod(lambda keys: keys)

    def forward(self, video: Tensor, text: Tensor, there: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch(video).flatten(2).transpose(1, 2)
        every = torch.ones(len(x), x.shape[1], dtype=torch.bool)
        mask = self.form(torch.cat([every, there], 1)[:, None, None])
        for block in self.blocks:
            x = block(x, text, mask)
        return self.head(x)


def expanded(keys: Tensor) -> Tensor:
    return keys.expand(-1, -1, keys.shape[-1], -1)


def of_heads(keys: Tensor) -> Tensor:
    return keys.expand(-1, models.HEADS, keys.shape[-1], -1)


def repeated(keys: Tensor) -> Tensor:
    return keys.repeat(1, 1, keys.shape[-1], 1)


def causal(keys: Tensor) -> Tensor:
    return repeated(keys) & torch.ones(keys.shape[-1], keys.shape[-1], dtype=torch.bool).tril()


def made(form: Form, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    monkeypatch.setattr(models, "Attention", Masked)
    monkeypatch.setattr(models, "Block", Block)
    monkeypatch.setattr(models, "Video", Joint)
    monkeypatch.setattr(Joint, "form", staticmethod(form))
    inputs = models.inputs(batch=2)
    inputs["there"] = torch.ones(inputs["text"].shape[:2], dtype=torch.bool)
    inputs["there"][0, 5:] = False
    return models.make(), inputs


@pytest.mark.parametrize(
    ("form", "route"),
    [
        *((form, "eager") for form in (expanded, of_heads, repeated)),
        *((form, "regional") for form in (expanded, of_heads)),
    ],
)
def test_rows_that_are_all_the_same_are_one_mask_over_keys(
    form: Form, route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model, inputs = made(form, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    assert len(plan.sites) == len(model.blocks)
    with torch.no_grad():
        dense = model(**inputs)
        whole = torch.compile(
            model, backend="freqopt", options={"plan": plan, "min_tokens": 0, "inner": "eager"}
        )
        expected = whole(**inputs)
        assert (expected - dense).norm() > 1e-3 * dense.norm()
        with freqopt.optimize(model, plan, route=route, inner="eager", strict=True):
            for _ in range(2):
                assert (model(**inputs) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("route", ["eager", "regional"])
def test_other_masks_of_that_form_stay_dense(route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan was made with a mask over keys alone."""
    torch._dynamo.reset()
    model, inputs = made(repeated, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    monkeypatch.setattr(Joint, "form", staticmethod(causal))
    with torch.no_grad():
        dense = model(**inputs)
        with freqopt.optimize(model, plan, route=route, inner="eager"):
            assert (model(**inputs) - dense).norm() < 1e-5 * dense.norm()
        torch._dynamo.reset()
        told = pytest.raises(SiteError, match="its mask")
        with freqopt.optimize(model, plan, route=route, inner="eager", strict=True), told:
            model(**inputs)
