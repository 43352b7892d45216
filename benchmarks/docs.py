"""Writes all that is generated in the documentation: `python -m benchmarks.docs`.

That is docs/results, tables in the README and in pages for users, and the picture of the split.
`--check` writes nothing and fails where a page says something else than its sources.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import picture, readme, results_pages, user_pages
from benchmarks.pages import DOCS, ROOT, filled

README = ROOT / "README.md"


def wanted() -> dict[Path, str]:
    """Every generated file, and what it should hold."""
    made = {DOCS / "results" / f"{page.name}.md": page.text() for page in results_pages.present()}
    made[DOCS / "results" / "README.md"] = results_pages.index()
    for page, name, inside in (
        (README, "measured", readme.measured()),
        (DOCS / "targets.md", "looks", user_pages.looks()),
        (DOCS / "troubleshooting.md", "reasons", user_pages.reasons()),
        (DOCS / "works-with.md", "ways", user_pages.ways_of_running()),
    ):
        made[page] = filled(page.read_text(encoding="utf-8"), name, inside)
    made[DOCS / "split.svg"] = picture.draw()
    return made


def stale() -> list[Path]:
    """Generated files that are not as they should be, and what nobody makes in docs/results."""
    made = wanted()
    others = set((DOCS / "results").iterdir()) - set(made)
    changed = [
        path
        for path, text in made.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    return [*changed, *others]


def main(arguments: list[str] | None = None) -> None:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args(arguments).check:
        if names := [str(path.relative_to(ROOT)) for path in stale()]:
            sys.exit(f"run `python -m benchmarks.docs`: {', '.join(names)} differ from the results")
        return
    for path, text in wanted().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
