"""Masks of the very call, where what the first call of its form showed holds no longer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from masked_models import make_model_of
from plans import plan_of
from torch import Tensor

import freqopt
from freqopt.calibration.measure.in_pieces import EagerRecorders
from freqopt.calibration.measure.recorder import Desk
from freqopt.eager import masks
from freqopt.eager.asked import Asked
from freqopt.eager.lay import Lay
from freqopt.eager.masks import Masks
from freqopt.errors import SiteError
from freqopt.passes.find import Grids
from freqopt.passes.reasons import Reason

EXACT = 0.0
"""The threshold at which a split computes what dense attention does."""


class Read(models.Video):
    """The text's length is read from data, and how many keys there are from the model itself."""

    keys: int | None = None
    form: Callable[[Tensor], Tensor] = staticmethod(lambda row: row)

    def forward(self, video: Tensor, text: Tensor, there: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch(video).flatten(2).transpose(1, 2)
        every, length = x.shape[1] + text.shape[1], x.shape[1] + int(there.sum(-1).max())
        row = torch.arange(every) < (length if self.keys is None else self.keys)
        mask = self.form(row[None, None, None])
        for block in self.blocks:
            x = block(x, text, mask)
        return self.head(x)


def added(row: Tensor) -> Tensor:
    return torch.zeros(row.shape).masked_fill(~row, -1e9)


def biased(row: Tensor) -> Tensor:
    """Zeros as long as all is there, and then numbers that have some weight."""
    return torch.zeros(row.shape).masked_fill(~row, -3.0)


def pairs(row: Tensor) -> Tensor:
    return row & row.transpose(-1, -2)


def repeated(row: Tensor) -> Tensor:
    return row.repeat(1, 1, row.shape[-1], 1)


def causal(row: Tensor) -> Tensor:
    return row & torch.ones(row.shape[-1], row.shape[-1], dtype=torch.bool).tril()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return make_model_of(Read, monkeypatch)


def call(text: int) -> dict[str, Tensor]:
    inputs = models.inputs()
    there = torch.arange(inputs["text"].shape[1]) < text
    return {**inputs, "there": there[None].float()}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("form", [None, pairs, repeated, added])
@torch.no_grad()
def test_a_length_that_is_read_from_data_is_that_of_the_call(form: Any, model: Any) -> None:
    if form is not None:
        model.form = form
    plan = plan_of(model, call(12), EXACT)
    dense = {text: model(**call(text)) for text in (12, 5, 0)}
    assert apart(dense[5], dense[12]) > 1e-3
    for order in ((12, 5, 0, 12), (5, 12)):
        with freqopt.optimize(model, plan, route="eager", strict=order[0] == 12):
            for text in order:
                assert apart(model(**call(text)), dense[text]) < 1e-5


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (None, "hides video"),
        (repeated, "hides video"),
        (added, "hides video"),
        (biased, "is added"),
    ],
)
@torch.no_grad()
def test_video_that_is_hidden_later_makes_the_call_dense(
    form: Any, why: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The model has changed, of which its arguments say nothing."""
    if form is not None:
        model.form = form
    plan = plan_of(model, call(12), 1.0)
    model.keys = 100
    dense = model(**call(12))
    for strict in (False, True):
        model.keys = None
        with (
            freqopt.optimize(model, plan, route="eager", strict=strict),
            caplog.at_level(logging.WARNING, "freqopt"),
        ):
            usual = model(**call(12))
            assert apart(usual, dense) > 1e-3
            model.keys = 100
            caplog.clear()
            if strict:
                with pytest.raises(SiteError, match=f"split in this call.*{why}"):
                    model(**call(12))
            else:
                assert all(apart(model(**call(12)), dense) < 1e-6 for _ in range(2))
                assert len([r for r in caplog.messages if why in r]) == 1
            model.keys = None
            assert apart(model(**call(12)), usual) < 1e-6


@torch.no_grad()
def test_pairs_that_are_hidden_later_make_the_call_dense(model: Any) -> None:
    model.form = repeated
    plan = plan_of(model, call(12), 1.0)
    with freqopt.optimize(model, plan, route="eager") as handle:
        model(**call(12))
        model.form = causal
        found = model(**call(12))
        handle.disable()
        assert apart(found, model(**call(12))) < 1e-6


def test_a_mask_is_looked_at_again_when_it_is_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before, for as long as it is the same."""
    looks: list[Tensor] = []
    checked = masks._checked
    monkeypatch.setattr(masks, "_checked", lambda m, lay: looks.append(m) or checked(m, lay))
    kept, q = torch.ones(1, 12, dtype=torch.bool), torch.ones(1, 2, 12, 8)
    lay = Lay("joint", (2, 2, 2), 1, 3, proven=True)
    seen = Masks(4)
    found = []
    for hidden in (None, None, 0, 0, slice(9, None), 5):
        if hidden is not None:
            kept[:, hidden] = False
        asked = Asked(F.scaled_dot_product_attention, (q, q, q), {"attn_mask": kept[None, None]})
        found.append(seen.checked(asked, lay))
    assert [each.mask for each in found[:-1]] == [0, 0, 1, 1, 1]
    assert found[-1].reason is Reason.MASK_UNLIKE and len(looks) == 5


@torch.no_grad()
def test_calibration_measures_with_the_mask_of_each_sample(model: Any) -> None:
    desk = Desk()
    recorders = EagerRecorders(model, desk, Grids())
    for text in (12, 5):
        assert apart(recorders((), call(text)), model(**call(text))) < 1e-5
    assert {known.mask for known in desk.layouts["blocks.0.attn"]} == {0, 1}
