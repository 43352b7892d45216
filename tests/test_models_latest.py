"""Classes that were tried last: attention found, told apart, and split exactly."""

from __future__ import annotations

import pytest
from model_cases import family
from model_checks import problems_of


@pytest.mark.parametrize("name", family("latest"))
def test_attention_of_real_models(name: str) -> None:
    """At threshold 0 a split model equals the dense one at each site and at its output."""
    assert not problems_of(name)
