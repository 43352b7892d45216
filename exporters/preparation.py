"""What every export begins with: the plan, a folder to fill, and the rewritten program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from freqopt.errors import FileError, OptionError
from freqopt.exporters.program import Program, make_program
from freqopt.grid import Grid
from freqopt.options import load_plan

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


class Prepared(NamedTuple):
    """The rewritten program, the folder that it is written to, and its plan."""

    program: Program
    folder: Path
    plan: Plan | None


def prepare(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out_dir: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None,
    dynamic_shapes: Any,
    grid: Grid | None,
    order: str | None,
    chunk: int | str,
    probes: int,
) -> Prepared:
    """Read the plan, make the folder and rewrite the model; arguments as in `export_onnx`.

    Raises:
        OptionError: the folder is a file.
        ExportError: a model that cannot be exported.
        PlanError: a plan that cannot be read, or was made for another model.
    """
    loaded = None if plan is None else load_plan(plan)
    folder = prepare_folder(out_dir)
    program = make_program(
        model,
        args,
        kwargs,
        plan=loaded,
        dynamic_shapes=dynamic_shapes,
        grid=grid,
        order=order,
        chunk=chunk,
        probes=probes,
    )
    return Prepared(program, folder, loaded)


def prepare_folder(out_dir: str | os.PathLike[str]) -> Path:
    """The output folder, created; a file in its place is refused."""
    folder = Path(out_dir)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise OptionError(f"out_dir {folder} is a file; name a folder to fill")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise FileError(f"cannot make the folder {folder}: {why}") from error
    return folder
