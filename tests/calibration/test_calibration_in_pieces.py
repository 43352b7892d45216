"""Models whose graph is in pieces are measured at whatever attention the route eager serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from calibration_models import TinyVideo, make_sample
from torch import Tensor

from freqopt.calibration.calibrate import calibrate
from freqopt.calibration.measure.in_pieces import EagerRecorders
from freqopt.calibration.measure.recorder import Desk, recording_backend
from freqopt.calibration.measure.requests import Dense, Request, SiteThresholds, Split
from freqopt.capture.modules import names_of
from freqopt.passes.find import Grids

Mix = Callable[..., Tensor]


def by_hand(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * q.size(-1) ** -0.5
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def einsums(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def batched(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    empty = torch.empty(len(q), q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, heads)


def folded(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    heads = q.shape[:2]
    out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)))
    return out.unflatten(0, heads)


def one_call(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None if hidden is None else ~hidden)


class Mixed(models.Attention):
    """Attention to the video and a text behind it, of which not all may be there."""

    mix: Mix = staticmethod(by_hand)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return self.out(self.mix(q, k, v, hidden).transpose(1, 2).flatten(2))


class Joint(models.Video):
    def forward(self, video: Tensor, text: Tensor, there: Tensor | None = None) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        tokens, hidden = x.shape[1], None
        if there is not None:
            video_keys = torch.ones(len(x), tokens, dtype=torch.bool)
            keys = torch.cat([video_keys, there], 1)
            hidden = ~keys[:, None, None]
        for block in self.blocks:
            x = x + block.attn(torch.cat([x, text], 1), hidden)[:, :tokens]
        return self.head(x)


def made(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    monkeypatch.setattr(models, "Attention", Mixed)
    monkeypatch.setattr(models, "Video", Joint)
    monkeypatch.setattr(Mixed, "mix", staticmethod(mix))
    return models.make(), models.inputs(batch=2)


def whole(model: Any, inputs: dict[str, Tensor], request: Request) -> tuple[Tensor, Desk]:
    desk = Desk(request)
    torch._dynamo.reset()
    backend = recording_backend(desk, Grids(), names_of(model))
    return torch.compile(model, backend=backend, dynamic=False)(**inputs), desk


@pytest.mark.parametrize(
    ("mix", "hides"),
    [
        *((mix, False) for mix in (by_hand, einsums, batched, folded, one_call)),
        (one_call, True),
    ],
)
@torch.no_grad()
def test_it_is_measured_as_the_whole_graph_is(
    mix: Mix, hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(mix, monkeypatch)
    if hides:
        there = torch.ones(inputs["text"].shape[:2], dtype=torch.bool)
        there[0, 5:] = False
        inputs["there"] = there
    dense, expected = whole(model, inputs, Dense())
    names = [f"blocks.{i}.attn" for i in range(3)]
    assert list(expected.result.shapes) == names
    thresholds = {name: SiteThresholds(torch.full((models.HEADS,), 2.0)) for name in names}
    split, told = whole(model, inputs, Split(thresholds))
    assert (split - dense).norm() > 1e-3 * dense.norm()
    models.breaking_linears(model)
    for request, wanted, of in ((Dense(), dense, expected), (Split(thresholds), split, told)):
        desk = Desk(request)
        recorders = EagerRecorders(model, desk, Grids())
        for _ in range(2):
            out = recorders((), inputs)
            assert (out - wanted).norm() < 1e-5 * wanted.norm()
        assert desk.result.shapes == of.result.shapes and desk.layouts == of.layouts
        assert desk.dense_sites.keys() == of.dense_sites.keys()
        for name, rows in of.result.densities.items():
            assert torch.allclose(desk.result.densities[name][0], rows[0], atol=1e-5)


@torch.no_grad()
def test_what_is_not_met_without_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of `torch.inference_mode` do not tell whether they were written into."""
    model, inputs = made(by_hand, monkeypatch)
    models.breaking_linears(model)
    desk = Desk(Dense())
    with torch.inference_mode():
        EagerRecorders(model, desk, Grids())((), inputs)
    assert not desk.result.shapes
    assert {"in pieces" in reason for reason in desk.dense_sites.values()} == {True}
    assert len(desk.dense_sites) == 3


class Looping(TinyVideo):
    """Breaks the graph in a loop where it is told to, so that Dynamo skips its forward for good."""

    broken = False

    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        x = self.patch(video).flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
            if self.broken:
                torch._dynamo.graph_break()
        return {"velocity": self.head(x)}


def test_what_another_backend_gave_up_is_compiled_again() -> None:
    sample, broken = make_sample(0), Looping()
    broken.broken = True
    with torch.no_grad():
        torch.compile(broken, backend="eager")(**sample)
    plan = calibrate(Looping(), [sample, make_sample(1)], progress=False, rounds=0, passes=1)
    assert list(plan.sites) == ["blocks.0.attn", "blocks.1.attn"]
