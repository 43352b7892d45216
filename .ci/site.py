"""What mkdocs is told beside mkdocs.yml: pages at the repository's root, and links to its files.

Pages link to files as they lie in the repository, so that links work on a code host and in an
editor. On the site the pages at the root are pages too, and other files are copied beside them.
Docstrings are read from a copy of the package, as four of its folders are symlinks.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
COPIES = "repository"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Copy the package's sources to where mkdocs.yml has docstrings read from."""
    copy = ROOT / "build" / "api" / "freqopt"
    shutil.rmtree(copy, ignore_errors=True)
    only = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.jsonl", "*.cc", "*.h")
    shutil.copytree(ROOT / "freqopt", copy, ignore=only)
    for folder in (ROOT / "freqopt").iterdir():
        if folder.is_symlink():
            (copy / folder.name / "__init__.py").touch()


def place(page: str, target: str) -> str | None:
    """Where a link of a page leads on the site; None if it leads to a folder of the repository.

    page: the page's path on the site. A target that is no file of the repository stays as it is.
    """
    home = ROOT if page in PAGES else ROOT / "docs" / posixpath.dirname(page)
    path = Path(os.path.normpath(home / target))
    if "://" in target or not path.exists():
        return target
    inside = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return None
    if inside.startswith("docs/"):
        where = inside.removeprefix("docs/")
    else:
        where = inside if inside in PAGES else f"{COPIES}/{inside}"
    return posixpath.relpath(where, posixpath.dirname(page) or ".")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root, and the files that pages link to."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    linked = set()
    for file in files.documentation_pages():
        for _, target, _ in LINK.findall(file.content_string):
            where = place(file.src_uri, target)
            if where is not None and COPIES in where:
                linked.add(
                    posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), where))
                )
    for name in sorted(linked):
        source = ROOT / name.removeprefix(f"{COPIES}/")
        files.append(File.generated(config, name, content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site."""

    def moved(link: re.Match[str]) -> str:
        words, target, anchor = link.groups()
        where = place(page.file.src_uri, target)
        return words if where is None else f"[{words}]({where}{anchor or ''})"

    return LINK.sub(moved, markdown)
