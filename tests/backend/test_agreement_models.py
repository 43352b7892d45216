"""Compiling, inspecting, calibrating and exporting agree on models of others and of the zoo."""

from __future__ import annotations

import pytest
import torch
from accounts import Case, check_agreement
from passes_models import CASES


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "wan")]
)
def test_all_four_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = CASES[name]
    inputs = model.inputs((3, 6, 10), 1, 7)
    split = sum(kind in ("self", "joint") for _, kind, _ in model.sites)
    check_agreement(Case(model.make(), inputs, split), monkeypatch)
