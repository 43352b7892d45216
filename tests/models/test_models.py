"""Real models: attention found, told apart, split exactly; and checks that themselves can fail."""

from __future__ import annotations

import pytest
import torch
from model_cases import FAMILIES, VARIANTS, Case, cases_of, load_all
from model_checks import look, problems, problems_of

CASES = load_all()


LONG = {"unet_motion", "anyflow_far"}
"""Cases that compile for long, of whose kind are unet_spatio_temporal, and anyflow beside
test_flex_attention_of_its_own_stays."""


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.smoke] * (name == "wan") + [pytest.mark.slow] * (name in LONG)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=marks_of(name))
        for family in FAMILIES
        for name in cases_of(family)
    ],
)
def test_attention_of_real_models(family: str, name: str) -> None:
    """At threshold 0 a split model equals the dense one at each site and at its output."""
    assert not problems_of(name)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(VARIANTS)))
@pytest.mark.parametrize("name", CASES)
def test_all_variants(name: str, index: int) -> None:
    """All grids and batches, not only the one that falls to a model above."""
    assert not problems_of(name, index)


def test_every_case_is_in_a_family() -> None:
    assert sorted(name for family in FAMILIES for name in cases_of(family)) == sorted(CASES)
    assert all(map(cases_of, FAMILIES))
    assert len(CASES) >= 115


def test_zero_parameters_are_refilled() -> None:
    """Behind a zero modulation, a wrong attention would not show."""
    for name in ("kandinsky5", "wan", "hunyuan"):
        model, _ = CASES[name].make((1, 2, 2), 1)
        assert all(bool(p.any()) for p in model.parameters())


def test_the_checks_see_a_wrong_expectation() -> None:
    """A case that expects something else than is there must fail."""
    from dataclasses import replace

    right = CASES["cogvideox"]
    seen = look(right, (3, 6, 10), 1)
    assert not problems(right, (3, 6, 10), seen)
    wrong: list[Case] = [
        replace(right, dense=1),
        replace(right, others=1),
        replace(right, kind="self"),
        replace(right, before=0),
    ]
    assert all(problems(case, (3, 6, 10), seen) for case in wrong)
    assert problems(right, (6, 3, 10), seen)
    assert problems(right, (3, 6, 10), replace(seen, got=[], expected=[]))
    seen.got = [tensor + 0.01 * torch.randn_like(tensor) for tensor in seen.got]
    assert problems(right, (3, 6, 10), seen)
