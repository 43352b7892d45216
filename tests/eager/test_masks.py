"""Masks over keys in the forms that models give them, where no graph shows what they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from masked_models import make_model_of
from plans import plan_of
from torch import Tensor

import freqopt
from freqopt.capture.asked_masks import is_as_believed
from freqopt.errors import SiteError
from freqopt.passes.masks.calibrated import KEYS, NOTHING, PAIRS

Form = Callable[[Tensor], Tensor]


class Joint(models.Video):
    """Attention to the video and a text behind it, of which not all is there."""

    form: Form = staticmethod(lambda keys: keys)

    def forward(  # type: ignore[override]
        self, video: Tensor, text: Tensor, there: Tensor, shown: Tensor | None = None
    ) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        every = torch.ones(len(x), x.shape[1], dtype=torch.bool) if shown is None else shown
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


def outer(keys: Tensor) -> Tensor:
    rows = keys.repeat(1, 1, keys.shape[-1], 1)
    return rows & rows.transpose(2, 3)


def banded(keys: Tensor) -> Tensor:
    places = torch.arange(keys.shape[-1])
    return outer(keys) & ((places[:, None] - places).abs() < 40)


def made(form: Form, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    monkeypatch.setattr(Joint, "form", staticmethod(form))
    inputs = models.inputs(batch=2)
    inputs["there"] = torch.ones(inputs["text"].shape[:2], dtype=torch.bool)
    inputs["there"][0, 5:] = False
    return make_model_of(Joint, monkeypatch), inputs


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


def hiding(inputs: dict[str, Tensor], video: int) -> dict[str, Tensor]:
    """The same call with the video's last third hidden in one batch item."""
    shown = torch.ones(len(inputs["there"]), video, dtype=torch.bool)
    shown[1, 2 * video // 3 :] = False
    return {**inputs, "shown": shown}


ROUTES = ["eager", "regional", "compile"]


def check_dense(
    model: Any, plan: Any, usual: Any, odd: Any, route: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two calls the second is dense, and that is said once; under `strict` it is an error."""
    torch._dynamo.reset()
    with torch.no_grad():
        dense, unsplit = model(**odd), model(**usual)
        assert (dense - unsplit).norm() > 1e-3 * dense.norm()
        with freqopt.optimize(model, plan, route=route, **inner(route)):
            split = model(**usual)
            assert (split - unsplit).norm() > 1e-3 * unsplit.norm()
            caplog.clear()
            for _ in range(2):
                assert (model(**odd) - dense).norm() < 1e-5 * dense.norm()
            told = [line for line in caplog.messages if ": its mask" in line]
            assert told and len(told) == len(set(told))
            assert (model(**usual) - split).norm() < 1e-5 * split.norm()
        torch._dynamo.reset()
        with freqopt.optimize(model, plan, route=route, strict=True, **inner(route)):
            model(**usual)
            for _ in range(2):
                with pytest.raises(SiteError, match="its mask"):
                    model(**odd)


def inner(route: str) -> dict[str, Any]:
    return {} if route == "eager" else {"inner": "eager"}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", [lambda keys: keys, outer], ids=["keys", "pairs"])
def test_a_mask_that_hides_video_in_a_later_call_is_honoured(
    form: Form, route: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibration saw calls without an optional mask of frames."""
    model, inputs = made(form, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    video = model.patch(inputs["video"])[0, 0].numel()
    check_dense(model, plan, inputs, hiding(inputs, video), route, caplog)


@pytest.mark.parametrize("route", ROUTES)
def test_a_mask_over_pairs_that_is_no_outer_product_any_more_is_honoured(
    route: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = made(lambda keys: outer(keys), monkeypatch)
    monkeypatch.setattr(Joint, "forward", _windowed)
    plan = plan_of(model, inputs, 1.0)
    check_dense(model, plan, inputs, {**inputs, "window": 40}, route, caplog)


def _windowed(self: Any, video: Tensor, text: Tensor, there: Tensor, window: int = 0) -> Tensor:
    x = self.patch(video).flatten(2).transpose(1, 2)
    keys = torch.cat([torch.ones(len(x), x.shape[1], dtype=torch.bool), there], 1)[:, None, None]
    mask = banded(keys) if window else outer(keys)
    for block in self.blocks:
        x = block(x, text, mask)
    return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inference", [False, True])
def test_a_float_of_the_call_may_cut_the_mask(
    inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler calls with other floats are of one form."""
    model, inputs = made(lambda keys: keys, monkeypatch)
    plan = plan_of(model, inputs, 1.0)

    def cut(self: Any, video: Tensor, text: Tensor, there: Tensor, keep: float) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        shown = torch.ones(len(x), x.shape[1], dtype=torch.bool)
        mask = torch.cat([shown, there], 1)[:, None, None]
        if keep < 1:
            mask = mask & (torch.arange(mask.shape[-1]) < int(keep * x.shape[1]))
        for block in self.blocks:
            x = block(x, text, mask)
        return self.head(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(Joint, "forward", cut)
    with torch.inference_mode(inference), torch.no_grad():
        dense, split = model(**inputs, keep=0.4), model(**inputs, keep=1.0)
        with freqopt.optimize(model, plan, route="eager"):
            assert (model(**inputs, keep=1.0) - split).norm() > 1e-3 * split.norm()
            assert (model(**inputs, keep=0.4) - dense).norm() < 1e-5 * dense.norm()


def test_what_is_asked_of_masks() -> None:
    keys = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keys[0, ..., 7:] = False
    assert is_as_believed(keys, KEYS, 0, 7) and not is_as_believed(keys, KEYS, 0, 8)
    assert not is_as_believed(keys, NOTHING, 0, 7) and is_as_believed(keys[1:], NOTHING, 0, 7)
    rows = keys.repeat(1, 3, 9, 1)
    assert is_as_believed(rows, KEYS, 0, 7) and is_as_believed(keys.expand(2, 3, 9, 9), KEYS, 0, 7)
    rows[1, 2, 4, 8] = False
    assert not is_as_believed(rows, KEYS, 0, 7)
    pairs = outer(keys)
    assert is_as_believed(pairs, PAIRS, 0, 7) and not is_as_believed(pairs, PAIRS, 1, 7)
    assert not is_as_believed(pairs, KEYS, 0, 7)
    assert not is_as_believed(keys.expand(2, 1, 9, 9), PAIRS, 0, 7)
    pairs[1, 0, 0, 8] = False
    assert not is_as_believed(pairs, PAIRS, 0, 7)
    assert is_as_believed(torch.zeros(1, 1, 9, 9), NOTHING, 0, 7)
    assert not is_as_believed(torch.eye(9)[None, None], NOTHING, 0, 7)


@pytest.mark.parametrize("route", ["eager", "regional"])
@pytest.mark.parametrize("view", [True, False])
@torch.no_grad()
def test_a_mask_whose_data_are_another_tensors_is_asked_again(
    view: bool, route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(lambda keys: keys, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    odd = hiding(inputs, 180)
    dense = model(**odd)
    torch._dynamo.reset()
    with freqopt.optimize(model, plan, route=route, **inner(route)):
        shown = torch.ones(2, 180, dtype=torch.bool)
        kept = torch.cat([shown, inputs["there"]], 1)
        kept = kept[:, None, None] if view else kept[:, None, None].clone()
        monkeypatch.setattr(Joint, "form", staticmethod(lambda keys: kept))
        assert (model(**inputs) - dense).norm() > 1e-3 * dense.norm()
        kept.data = torch.cat([odd["shown"], inputs["there"]], 1)[:, None, None]
        assert (model(**inputs) - dense).norm() < 1e-5 * dense.norm()


@pytest.mark.parametrize("route", ROUTES)
@torch.no_grad()
def test_a_mask_of_one_entry_for_all_keys_keeps_calls_dense_and_working(
    route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(lambda keys: keys, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    monkeypatch.setattr(Joint, "form", staticmethod(lambda keys: keys[..., :1]))
    dense = model(**inputs)
    torch._dynamo.reset()
    with freqopt.optimize(model, plan, route=route, **inner(route)):
        found = model(**inputs)
    assert (found - dense).norm() < 1e-5 * dense.norm()


@pytest.mark.parametrize("route", ["regional", "compile"])
def test_training_goes_on_where_a_mask_keeps_a_call_dense(
    route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(lambda keys: keys, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    odd = hiding(inputs, 180)

    def gradient() -> Tensor:
        model.zero_grad()
        model(**odd).square().sum().backward()
        grad = model.blocks[0].attn.q.weight.grad
        assert grad is not None
        return grad.clone()

    dense = gradient()
    torch._dynamo.reset()
    with freqopt.optimize(model, plan, route=route, inner="aot_eager"):
        model(**inputs).square().sum().backward()
        assert (gradient() - dense).norm() < 1e-4 * dense.norm()


@pytest.mark.parametrize("route", ["compile", "regional"])
@torch.no_grad()
def test_sites_that_the_plan_leaves_dense_are_not_asked(
    route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(lambda keys: keys, monkeypatch)
    plan = plan_of(model, inputs, 1.0)
    dense = {"decision": "dense", "reason": "as the test wants it"}
    sites = {name: site.model_copy(update=dense) for name, site in plan.sites.items()}
    plan = plan.model_copy(update={"sites": sites})
    torch._dynamo.reset()
    with freqopt.optimize(model, plan, route=route, inner="eager", strict=True):
        model(**inputs)
        model(**hiding(inputs, 180))
