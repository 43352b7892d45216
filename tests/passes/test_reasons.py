"""Reasons: each is given somewhere, with the details that its text names; all are sentences."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from freqopt.passes.reasons import Reason, Why

ROOT = Path(__file__).parents[2]
ROOMS = ("freqopt", "passes", "exporters")
FILES = sorted({file.resolve() for room in ROOMS for file in (ROOT / room).rglob("*.py")})


def fields(reason: Reason) -> set[str]:
    """Names of the details in a reason's text."""
    return {name for _, name, _, _ in Formatter().parse(reason.value.seen) if name}


def given() -> Iterator[tuple[str, str, set[str]]]:
    """Every `Reason.NAME(details)` in the source: where, which, and the names of its details."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "Reason":
                    assert not node.args
                    where = f"{file.name}:{node.lineno}"
                    yield where, node.func.attr, {str(word.arg) for word in node.keywords}


def test_every_reason_is_given_with_the_details_of_its_text() -> None:
    found = list(given())
    wrong = [where for where, name, details in found if details != fields(Reason[name])]
    assert wrong == []
    assert {name for _, name, _ in found} == set(Reason.__members__)


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_reads_as_a_sentence(reason: Reason) -> None:
    details: dict[str, object] = dict.fromkeys(fields(reason), 3)
    said = str(reason(**details))
    assert isinstance(reason(**details), Why) and reason(**details).reason is reason
    assert said and "{" not in said and said == said.strip() and not said.endswith(".")
    assert said.endswith(reason.value.advice)
