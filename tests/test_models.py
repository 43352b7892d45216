"""Real models: every variant of every case, and that the checks themselves can fail.

The cases are tried once each in `test_models_<family>.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_cases import FAMILIES, Case, family, load_all
from model_checks import look, problems, problems_of

CASES = load_all()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("name", CASES)
def test_all_variants(name: str, index: int) -> None:
    """All grids and batches, not only the one that falls to a model above."""
    assert not problems_of(name, index)


def test_every_case_is_in_a_test_file() -> None:
    """Each family has a file of its own, so that none takes long."""
    here = Path(__file__).parent
    assert all((here / f"test_models_{name}.py").exists() for name in FAMILIES)
    assert sorted(name for each in FAMILIES for name in family(each)) == sorted(CASES)
    assert len(CASES) >= 60


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
    seen.got = [tensor + 0.01 * torch.randn_like(tensor) for tensor in seen.got]
    assert problems(right, (3, 6, 10), seen)
