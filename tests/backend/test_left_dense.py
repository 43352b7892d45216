"""Calls after all was split whose graphs leave planned attention dense: each reason is told."""

from __future__ import annotations

import logging
from typing import Any

import masked_models
import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend

ADDED, SHOWN = "its mask is added to the scores", "planned sites split in this call"


class Attention(models.Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class Masked(models.Video):
    """Its blocks are given a mask over the video and the text, or none."""

    def forward(self, video: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text, mask)
        return self.head(x)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> models.Video:
    torch._dynamo.reset()
    monkeypatch.setattr(masked_models, "Masked", Attention)
    made = masked_models.make_model_of(Masked, monkeypatch)
    models.breaking_linears(made)
    return made


def compiled_at(way: str, model: nn.Module, *, strict: bool) -> nn.Module:
    """A model in pieces, with a plan among the options or attached."""
    plan = plan_of(model, models.inputs(), 1.0)
    options: dict[str, Any] = {"inner": "eager", "strict": strict}
    if way == "plan":
        options["plan"] = plan
    else:
        freqopt.attach(model, plan)
    model.compile(backend=freqopt_backend, options=options)
    return model


def called(model: nn.Module, mask: Tensor | None = None) -> None:
    with torch.no_grad():
        model(**models.inputs(), mask=mask)


@pytest.mark.parametrize("way", ["plan", "attached"])
def test_each_reason_of_later_calls_in_pieces_is_told_once(
    way: str, model: models.Video, caplog: pytest.LogCaptureFixture
) -> None:
    run = compiled_at(way, model, strict=False)
    called(run)
    with caplog.at_level(logging.WARNING, "freqopt"):
        called(run)
        assert not caplog.messages
        called(run, torch.zeros(1, 1, 192, 192))
        assert [ADDED in text and f"0 of 3 {SHOWN}" in text for text in caplog.messages] == [True]
        called(run, torch.zeros(192, 192))
        assert len(caplog.messages) == 1, "the same reason in another graph"
        called(run, torch.ones(1, 1, 192, 192, dtype=torch.bool).tril())
        assert len(caplog.messages) == 2 and "cannot be proven" in caplog.messages[1]
        called(run)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("way", ["plan", "attached"])
def test_later_calls_in_pieces_are_errors_where_all_must_be_split(
    way: str, model: models.Video
) -> None:
    run = compiled_at(way, model, strict=True)
    called(run)
    for _ in range(2):
        with pytest.raises(freqopt.SiteError, match=ADDED):
            called(run, torch.zeros(1, 1, 192, 192))
    freqopt.reset_counters()
    called(run)
    assert freqopt.counters().split == 3


kept: list[Any] = []


def replaced(*args: Tensor) -> Tensor:
    """Runs a block of which nothing on the way to it tells the name."""
    out: Tensor = kept[0](*args)
    return out


@pytest.mark.parametrize("strict", [False, True])
def test_a_forward_that_is_replaced_after_the_first_call_is_told(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    model = models.make()
    plan = plan_of(model, models.inputs(), 1.0)
    handle = freqopt.optimize(model, plan, route="compile", inner="eager", strict=strict)

    def call() -> None:
        with torch.no_grad():
            model(**models.inputs())

    call()
    block = model.blocks[1]
    kept[:] = [block.forward]
    block.forward = replaced
    with caplog.at_level(logging.WARNING, "freqopt"):
        if strict:
            with pytest.raises(freqopt.SiteError, match="serves several layers"):
                call()
        else:
            call()
            call()
            assert len(caplog.messages) == 1 and f"2 of 3 {SHOWN}" in caplog.messages[0]
            assert "serves several layers" in caplog.messages[0]
    del block.forward
    kept.clear()
    call()
    handle.disable()
