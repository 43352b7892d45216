"""No circles inside calibration and plan, and between calibration's rooms data flows one way."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "freqopt"
FLOORS = (
    *("values", "samples", "samples_file", "checkpoint"),
    *("measure", "runner", "search", "survey", "evidence", "phases", "calibrate"),
)
"""Of calibration, from the ground up: a module imports from its own floor and from lower ones."""


def needs_of(*rooms: str) -> dict[str, set[str]]:
    """{module: modules of these rooms that it imports}, imports for type checking included."""
    files = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
        for room in rooms
        for file in (PACKAGE / room).rglob("*.py")
        if file.stem != "__init__"
    }
    needs: dict[str, set[str]] = {}
    for name, file in files.items():
        imports = [
            n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)
        ]
        named = {f"{n.module}.{alias.name}" for n in imports for alias in n.names}
        named |= {str(n.module) for n in imports}
        needs[name] = {each.removeprefix("freqopt.") for each in named} & set(files)
    return needs


def test_there_is_no_circle() -> None:
    needs = needs_of("plan", "calibration")
    assert sum(map(len, needs.values())) > 60
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({**needs, "plan.records": {"calibration.phases"}}).prepare()


def test_data_flows_one_way_between_the_rooms() -> None:
    height = {floor: number for number, floor in enumerate(FLOORS)}
    for name, targets in needs_of("plan", "calibration").items():
        room, *inside = name.split(".")
        for target in targets:
            target_room, *target_inside = target.split(".")
            assert target_room in ("plan", room), f"{name} imports {target}"
            if target_room == "calibration":
                assert height[target_inside[0]] <= height[inside[0]], f"{name} imports {target}"
