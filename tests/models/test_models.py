"""Real models: attention found, told apart, split exactly; and checks that themselves can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import FAMILIES, VARIANTS, Case, cases_of, load_all
from model_checks import look, problems, problems_of, tensors

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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_case_does_not_depend_on_what_was_in_memory(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one case are compared with each other, each made in the memory that was free then."""
    empty = torch.empty

    def made_in(value: float, name: str) -> list[torch.Tensor]:
        def used(*args: Any, **kwargs: Any) -> torch.Tensor:
            found = empty(*args, **kwargs)
            if torch.are_deterministic_algorithms_enabled() or not found.is_floating_point():
                return found
            return found.fill_(value)

        monkeypatch.setattr(torch, "empty", used)
        torch.manual_seed(0)
        model, inputs = CASES[name].make(*CASES[name].variant(0))
        monkeypatch.setattr(torch, "empty", empty)
        return [*model.state_dict().values(), *tensors(inputs), torch.rand(1)]

    for name in cases_of(family):
        first, second = made_in(0.0, name), made_in(1.0, name)
        assert len(first) == len(second) > 1
        pairs = zip(first, second, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if not a.is_meta), name
        assert not any(a.isnan().any() for a in first if a.is_floating_point()), name


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
