"""Pages whose tables come from result files: what stands between a page's markers of one name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = RESULTS.parent.parent / "docs"


def markers(name: str) -> tuple[str, str]:
    """What stands before and after the lines of that name."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def rewrite(page: Path, name: str, text: str, *, check: bool) -> bool:
    """Put text between a page's markers of that name; whether it was there already.

    check: only look.
    """
    begin, end = markers(name)
    old = page.read_text()
    head, rest = old.split(begin)
    _, tail = rest.split(end)
    new = "\n".join([head + begin, text, end + tail])
    if not check:
        page.write_text(new)
    return new == old


def rewrite_kernels(
    result: str, table: Callable[[dict[str, Any]], list[str]], *, check: bool
) -> bool:
    """The table of a result file in docs/kernels.md, as `rewrite`.

    result: the file's name, without its ending; the marker has spaces for its underscores.
    """
    found = json.loads((RESULTS / f"{result}.json").read_text())
    text = "\n".join(table(found))
    return rewrite(DOCS / "kernels.md", result.replace("_", " "), text, check=check)
