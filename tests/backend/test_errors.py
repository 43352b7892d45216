"""Errors of freqopt leave a compilation as themselves, whichever they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import freqopt
from freqopt.errors import through_compiler

KINDS = (
    freqopt.FreqoptError,
    freqopt.InputError,
    freqopt.OptionError,
    freqopt.PlanError,
    freqopt.SiteError,
    freqopt.CalibrationError,
    freqopt.ExportError,
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_leaves_a_compilation_as_itself(kind: type[Exception]) -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        with through_compiler():
            raise kind("what was seen") from KeyError("a cause")

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    with pytest.raises(kind) as caught:
        torch.compile(Model(), backend=backend)(torch.ones(2))
    assert str(caught.value) == "what was seen" and type(caught.value).__name__ == kind.__name__
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is kind and str(again) == "what was seen"
