"""Pages whose figures come from result files: where they are, and how they are written or compared.

`benchmarks.docs` is the command; the tables are made beside the benchmarks that measured them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

MOVING = DOCS / "demo.png"
"""The README's moving picture, of the demo on a CPU."""


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """A result file, by its name without the ending."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def origin(result: dict[str, Any]) -> str:
    """Device, versions and commit of a result, as a sentence that begins a line."""
    where = result["environment"]
    parts = [where["device"], f"torch {where['torch']}"]
    if "onnxruntime" in where:
        parts.append(f"onnxruntime {where['onnxruntime']}")
    older = set(commits(result)) - {where["commit"]}
    some = f", some rows of {', '.join(sorted(older))}" if older else ""
    return f"{', '.join(parts)}, commit {where['commit']}{some}."


def commits(part: Any) -> Iterator[str]:
    """Commits that a part of a result names, its rows' among them."""
    if isinstance(part, dict):
        if "commit" in part:
            yield part["commit"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from commits(each)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Cells as the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def between(text: str, name: str) -> tuple[str, str, str]:
    """A page before, between and after the markers of a name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    inside, tail = rest.split(end)
    return head + begin, inside, end + tail


def filled(text: str, name: str, inside: str) -> str:
    """A page with other lines between the markers of a name."""
    head, _, tail = between(text, name)
    return f"{head}\n{inside}\n{tail}"
