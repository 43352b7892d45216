"""Plans as a folder that travels: a file for each component, and a page with the figures.

A file says which component it is for, so one that was renamed to another's is refused. The page
names the components, so that what an earlier save left in the folder is no part of a later one.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from freqopt.errors import FileError, InputError, PlanError
from freqopt.files import check_path, check_writable, read_bounded, write_atomically
from freqopt.plan.content import PlanContent
from freqopt.plan.text import verification
from freqopt.shown import shown

SUFFIX = ".plan.json"
PAGE = "README.md"
MARK = "library_name: freqopt"
MOST_PAGE_BYTES = 2**24
INDEX = "freqopt_components:"
"""Line of the page's head, before one for each component."""
ALONE = "model"
"""The component of a plan that was saved by itself."""

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=PlanContent)


def is_file(output: str | os.PathLike[str]) -> bool:
    """Whether plans are saved there as one file; else as a folder."""
    return Path(output).suffix == ".json"


def check_place(output: str | os.PathLike[str], names: Iterable[str] = ()) -> None:
    """Try whether plans can be saved to a file (.json), or to a folder.

    names: of their components.

    Raises:
        FileError: they cannot.
        InputError, PlanError: see `write_folder`.
    """
    if is_file(output):
        check_writable(output)
    else:
        _check_folder(Path(output), names)


def _check_folder(folder: Path, names: Iterable[str]) -> None:
    page = folder / PAGE
    check_writable(page)
    if os.path.lexists(page) and not _is_ours(page):
        raise PlanError(f"{page} is not about plans and would be lost: name another folder")
    for name in names:
        check_file_part(name)


def check_file_part(name: str) -> None:
    """Refuse the name of a component, which may be a stranger's, that is none for a file.

    Raises:
        InputError: it is empty, leads elsewhere, or holds what cannot be shown.
    """
    if not name or Path(name).name != name or "\\" in name or not name.isprintable():
        raise InputError(f"component {shown(name)!r} cannot be part of a file's name")


def _is_ours(page: Path) -> bool:
    try:
        return MARK.encode() in read_bounded(page, MOST_PAGE_BYTES)[:200]
    except OSError as error:
        raise FileError(f"cannot write {page}: {error.strerror or error}") from error


def read_folder(folder: Path, load: Callable[[Path], Kind]) -> dict[str, Kind]:
    """The plans in a folder, by component: those that its page names, if it does, and is ours.

    Raises:
        PlanError: none, a damaged one, or one that is another component's.
    """
    files = sorted(folder.glob(f"*{SUFFIX}"))
    named = _index_of(folder / PAGE)
    others = [file for file in files if named is not None and _component_of(file) not in named]
    if others:
        files = [file for file in files if file not in others]
        logger.warning(
            "%s: %s left out, as %s does not name it among the components that were saved there "
            "last: remove it, or add it there",
            folder,
            ", ".join(file.name for file in others),
            PAGE,
        )
    if not files:
        raise PlanError(
            f"{folder} holds no plans (files *{SUFFIX}); Plan.save_pretrained writes such a folder"
        )
    found = {}
    for file in files:
        name, plan = _component_of(file), load(file)
        check_component(plan, name, str(file))
        found[name] = plan
    return found


def _component_of(file: Path) -> str:
    return file.name.removesuffix(SUFFIX)


def _index_of(page: Path) -> set[str] | None:
    """The components that a page of ours names; None where there is none, or an older one."""
    try:
        lines = read_bounded(page, MOST_PAGE_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeError):
        return None
    head = lines[: lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    if MARK not in head or INDEX not in head:
        return None
    found = set()
    for line in head[head.index(INDEX) + 1 :]:
        if not line.startswith("- "):
            break
        try:
            found.add(str(json.loads(line[2:])))
        except ValueError:  # as somebody wrote it
            found.add(line[2:].strip())
    return found


def check_component(plan: PlanContent, name: str, origin: str) -> None:
    """Refuse the plan of another component.

    Raises:
        PlanError: it says that it is another's.
    """
    if name != ALONE and plan.component not in (None, name):
        times = ""
        if plan.timestep_range is not None:
            low, high = plan.timestep_range
            times = f", verified at {plan.timestep_name} {low:g} to {high:g}"
        raise PlanError(
            f"{origin} is the plan of {plan.component}{times}, and was given for {name}: are two "
            "plans swapped?"
        )


def write_folder(plans: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write plans by component, each into a file, and a page about them.

    Raises:
        InputError: a component's name cannot be part of a file's name.
        PlanError: a plan is another component's, or the folder has a page about something else.
        FileError: it cannot be written.
    """
    check_path(folder, "folder")
    target = Path(folder)
    _check_folder(target, plans)
    for name, plan in plans.items():
        check_component(plan, name, "the plan")
    for name, plan in plans.items():
        own = plan.component if name == ALONE else name
        plan.model_copy(update={"component": own}).save(target / f"{name}{SUFFIX}")
    write_atomically(target / PAGE, page_of(plans))


def page_of(plans: Mapping[str, PlanContent]) -> str:
    """The page of a folder, with what the Hub reads at its top."""
    lines = [
        "---",
        MARK,
        "tags:",
        "- freqopt",
        "- attention",
        INDEX,
        *(f"- {json.dumps(name, ensure_ascii=False)}" for name in plans),
        "---",
        "",
        "# Plans for frequency-split attention",
        "",
        "```python",
        "import freqopt",
        "",
        'handle = freqopt.optimize(pipe, "this folder or repository")',
        "```",
        "",
        "| component | model | output error | worst sample | pairs exact | grids | timesteps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, plan in plans.items():
        grids = ", ".join("x".join(map(str, grid)) for grid in plan.grids)
        times = "-"
        if plan.timestep_range is not None:
            times = "{:g} to {:g}".format(*plan.timestep_range)
        predicted = " (predicted)" if plan.predicted else ""
        lines.append(
            f"| {name} | {plan.model.class_name} | {plan.measured_error:.4f}{predicted} | "
            f"{plan.worst_error:.4f} | {plan.mean_density:.1%} | {grids} | {times} |"
        )
    lines += ["", "Errors are relative L2 errors of the model's output on held-out samples.", ""]
    for name, plan in plans.items():
        split = sum(site.decision == "split" for site in plan.sites.values())
        line = (
            f"{name}: {split} of {len(plan.sites)} sites split; {plan.evidence.samples} samples "
            f"and {plan.evidence.held_out} held out; {plan.device}, torch {plan.versions.torch}, "
            f"freqopt {plan.versions.freqopt}"
        )
        lines += [f"{line}.", "", *(f"* {told}" for told in verification(plan)), ""]
    return "\n".join(lines)


def fetched(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A folder as it is here, or a repository of the Hugging Face Hub, brought here.

    Raises:
        PlanError: neither, or huggingface_hub is not installed.
    """
    check_path(source, "source")
    path = Path(source)
    if os.path.isdir(path):  # Path.is_dir raises for some names
        return path
    text = str(source)
    named = text.count("/") == 1 and all(text.split("/")) and text[0] != "." and "\\" not in text
    if not named or path.suffix == ".json":
        raise PlanError(
            f"{text} is no folder here, and no repository of the Hugging Face Hub (owner/name)"
        )
    hub = _hub(f"reading {text} from")
    try:
        patterns = [f"*{SUFFIX}", PAGE]
        return Path(hub.snapshot_download(text, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the Hub's errors are
        raise PlanError(f"{text} cannot be read from the Hugging Face Hub: {error}") from error


def pushed(
    plans: Mapping[str, Any], repository: str, *, private: bool = False, message: str | None = None
) -> str:
    """Upload plans as a repository of the Hugging Face Hub; returns the address of the commit."""
    hub = _hub("uploading to")
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(plans, folder)
        api.create_repo(repository, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message or "Add plans of freqopt"
        )
    return str(found)


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise PlanError(
            f"{what} the Hugging Face Hub needs the package huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    return huggingface_hub
