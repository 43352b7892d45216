"""Exported graphs that do not show how tokens lie: the call and its plan do, for its extents."""

from __future__ import annotations

import model_cases
import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.calibration.runner import output_tensors
from freqopt.errors import PlanError
from freqopt.exporters.program import make_program

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["joyimage_plus", "z_image"])
def test_sites_are_those_of_the_plan(name: str) -> None:
    """A list of extents that no layer reads, and images in a list that are put together."""
    case = model_cases.load_all()[name]
    torch.manual_seed(0)
    model, inputs = case.make(*case.variant(0))
    plan = plan_of(model, inputs, 1.0)
    program = make_program(model, (), inputs, plan=plan)
    assert set(program.split) == set(plan.sites) and plan.sites
    with torch.no_grad():
        dense = output_tensors(model(**inputs))
        with freqopt.optimize(model, plan, route="eager", strict=True):
            expected = output_tensors(model(**inputs))
        got = output_tensors(program.exported.module()(**inputs))
    for plain, one, other in zip(dense, expected, got, strict=True):
        assert (one - plain).norm() > 1e-3 * plain.norm()
        assert (other - one).norm() < 1e-4 * one.norm()


class Packed(nn.Module):
    """Tokens that come packed, and a text behind them."""

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([tokens, text], 1)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0, : tokens.shape[1]]


def test_a_plan_of_which_nothing_can_be_split_is_refused_with_the_reasons() -> None:
    model, inputs = Packed(), {"tokens": torch.randn(1, 180, 16), "text": torch.randn(1, 7, 16)}
    plan = plan_of(model, inputs, 1.0, given=(3, 6, 10))
    shorter = {**inputs, "tokens": torch.randn(1, 120, 16)}
    with pytest.raises(PlanError, match=r"can be split in .*\(found: model\); .*pass grid=\(t, h"):
        make_program(model, (), shorter, plan=plan)
