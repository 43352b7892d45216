"""Documentation holds together: links, headings, lengths, and lists that must be complete.

Links are followed here so that a broken one fails without mkdocs; `make docs` builds the site.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import freqopt
from freqopt.cli.app import app
from freqopt.options import Options

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])

WIDTH = 110
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.M | re.S)


def prose(page: Path) -> str:
    """A page without its blocks of code and code in lines."""
    return re.sub(r"`[^`\n]*`", "", CODE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> Iterator[str]:
    """Anchors of a page's headings, as a code host makes them."""
    seen: dict[str, int] = {}
    for words in re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        yield f"{slug}-{count}" if count else slug


def broken_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        if not target.exists():
            found.append(link)
        elif anchor and anchor not in anchors(target):
            found.append(link)
    return found


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.smoke
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("# One `two`, three\n\n# Twice\n\n# Twice\n\n```sh\n# no heading\n```\n")
    page.write_text(
        "# Here\n[1](b.md) [2](b.md#one-two-three) [3](b.md#twice-1) [4](#here)\n"
        "[5](none.md) [6](b.md#none) [7](#none) [8](b.md#no-heading) `[9](none.md)`\n"
        "[10](https://example.org/none)\n"
    )
    assert broken_links(page) == ["none.md", "b.md#none", "#none", "b.md#no-heading"]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=named)
def test_lines_are_short(page: Path) -> None:
    long = [line for line in page.read_text().splitlines() if len(line) > WIDTH]
    assert not [line for line in long if not line.startswith("|")]


def test_pages_for_who_changes_the_code_are_short() -> None:
    for page in DOCS.glob("design/*.md"):
        assert len(page.read_text().splitlines()) < 200, page.name


def test_every_page_is_reached_from_the_first() -> None:
    reached, left = {DOCS / "README.md"}, [DOCS / "README.md"]
    while left:
        page = left.pop()
        for link in LINK.findall(prose(page)):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in reached:
                reached.add(target)
                left.append(target)
    assert not set(DOCS.glob("**/*.md")) - reached


def test_every_page_is_on_the_site() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(listed) == len(set(listed))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md")}
    assert set(listed) == pages | {"CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}


def test_pages_that_sources_name_are_there() -> None:
    named_pages = {}
    for folder in ("freqopt", "passes", "kernels", "exporters", "benchmarks", "tests", ".ci"):
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix in (".py", ".cc", ".h", ".yml"):
                for name in re.findall(r"\bdocs/[\w/-]+\.\w+", file.read_text(encoding="utf-8")):
                    named_pages[name] = file
    assert len(named_pages) > 5
    assert not {name: file for name, file in named_pages.items() if not (ROOT / name).exists()}


def commands(group: typer.core.TyperGroup, before: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}"


def test_the_page_of_commands_has_them_all() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    text = (DOCS / "commands.md").read_text()
    every = list(commands(group, "freqopt"))
    assert len(every) > 8
    assert not [name for name in every if f"| `{name}" not in text]
    calibrate = {
        option for parameter in group.commands["calibrate"].params for option in parameter.opts
    }
    listed = set(re.findall(r"--[a-z-]+", text))
    assert {option for option in calibrate if option.startswith("--")} <= listed | {"--output"}


def test_the_first_page_has_all_options_of_the_backend() -> None:
    (table,) = re.findall(
        r"^## The backend's options\n(.*?)^## ", (DOCS / "start.md").read_text(), re.M | re.S
    )
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == {f.name for f in fields(Options)}


def test_the_api_has_every_public_name() -> None:
    text = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    shown = set(re.findall(r"^::: freqopt\.(\w+)$", text, re.M))
    assert set(freqopt.__all__) - {"__version__"} <= shown


PUBLIC = (
    "options.Options",
    "inspection.InspectedSite",
    "inspection.GraphBreak",
    "inspection.Inspection",
    "telling.counting.SiteCount",
    "telling.counting.ModelCount",
    "telling.counting.Counters",
    "plan.plan.Plan",
    "plan.records.SitePlan",
    "plan.records.Budget",
    "plan.records.Curve",
    "plan.records.BucketCurves",
    "plan.records.Spectrum",
    "plan.records.SiteEvidence",
    "plan.records.SiteTiming",
    "plan.records.Trial",
    "plan.records.Verified",
    "plan.records.Comparison",
    "plan.records.ContentCurve",
    "plan.records.Evidence",
    "plan.records.ModelIdentity",
    "plan.records.Versions",
    "exporters.manifest.Artifact",
    "exporters.runner.RunResult",
)


@pytest.mark.parametrize("path", PUBLIC)
def test_fields_are_described_one_by_one(path: str) -> None:
    module, name = path.rsplit(".", 1)
    made = getattr(__import__(f"freqopt.{module}", fromlist=[name]), name)
    text = (made.__doc__ or "").partition("Attributes:\n")[2]
    described = re.findall(r"^ {8}(\w+): \S", text, re.M)
    assert described == list(getattr(made, "model_fields", None) or made.__dataclass_fields__)


@pytest.mark.skipif(
    "optimize" not in freqopt.__all__,
    reason="freqopt.optimize, which the README shows, is not here",
)
@pytest.mark.usefixtures("no_code")
def test_the_readmes_lines_run() -> None:
    from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # untrained models end in zeros

    class Pipe:
        transformer = model

        def __call__(self, prompt: str | list[str], **given: Any) -> None:
            for step in range(2):
                video, timestep = torch.randn(1, 3, 5, 28, 36), torch.full((1,), 0.4 * (step + 1))
                self.transformer(video=video, timestep=timestep)

    freqopt.reset_counters()
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    exec(block, {"pipe": Pipe()})
    assert freqopt.counters().split >= 2


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed; see `make docs`")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "api" / "use" / "index.html").exists()
    shutil.rmtree(ROOT / "build" / "api", ignore_errors=True)
