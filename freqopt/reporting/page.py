"""A page: sections, cards and tables in one HTML file that needs no network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from freqopt.files import write_atomically


@dataclass(frozen=True)
class Section:
    """A section of the report. title: plain text. html: trusted HTML, put in as it is."""

    title: str
    html: str


class Card(NamedTuple):
    """A figure at the head of a page. good: whether it is what was hoped for."""

    label: str
    value: str
    good: bool = True


def write_page(
    path: str | os.PathLike[str],
    title: str,
    lead: str,
    cards: Sequence[Card],
    sections: Sequence[Section],
    *,
    notes: Sequence[str] = (),
    details: Sequence[Section] = (),
) -> Path:
    """Write a page of sections; returns its path.

    title, lead, notes: plain text. details: sections that are folded away at the end.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("freqopt.reporting").joinpath("templates/report.html")
    html = environment.from_string(template.read_text("utf-8")).render(
        title=title, lead=lead, cards=cards, notes=notes, sections=sections, details=details
    )
    write_atomically(path, html)
    return Path(path)


def table_html(
    header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Sequence[int] = ()
) -> str:
    """A table; cells are escaped, and the columns listed in `numbers` are aligned right."""

    def row(cells: Sequence[Any], tag: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            style = ' class="number"' if i in numbers else ""
            parts.append(f"<{tag}{style}>{escape(str(cell))}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody>'
        "</table></div>"
    )
