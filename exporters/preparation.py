"""What every export begins with: the plan, a folder to fill, and the rewritten program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freqopt.config import DEFAULT_PROBES
from freqopt.errors import FileError, OptionError
from freqopt.exporters.program import Program, make_program
from freqopt.files import check_path
from freqopt.grid import Grid
from freqopt.kernels.checks import MOST_PROBES
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
        OptionError: the folder is a file, probes are no number of queries, or the example is empty.
        ExportError: a model that cannot be exported.
        PlanError: a plan that cannot be read, or was made for another model.
    """
    check_probes(probes)
    _check_example(args, kwargs)
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


def check_probes(probes: object) -> None:
    """Raise OptionError unless so many queries can be probed in every call."""
    if type(probes) is not int or not 0 <= probes <= MOST_PROBES:
        raise OptionError(
            f"probes is {probes!r}; a whole number of queries, 0 to {MOST_PROBES}, is needed "
            f"({DEFAULT_PROBES} is the default)"
        )


def _check_example(args: object, kwargs: object) -> None:
    """Raise OptionError where the example is an empty batch, which the file would be for."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > 1 and not len(leaf):
            raise OptionError(
                f"the example has an input of shape {tuple(leaf.shape)}, an empty batch; give one "
                "of the size that the file is for, of 2 where the batch is to be free"
            )


def check_capabilities(capabilities: object) -> None:
    """Raise OptionError unless it is None or whole numbers, as [80, 90]."""
    if capabilities is None:
        return
    given = list(capabilities) if isinstance(capabilities, (Sequence, Set)) else [None]
    if not all(type(each) is int for each in given):
        raise OptionError(
            f"capabilities is {capabilities!r}; a list of whole numbers is needed, as [80, 90] for "
            "Ampere and Hopper"
        )


def prepare_folder(out_dir: str | os.PathLike[str]) -> Path:
    """The output folder, created; a file in its place is refused."""
    check_path(out_dir, "out_dir")
    folder = Path(out_dir)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise OptionError(f"out_dir {folder} is a file; name a folder to fill")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise FileError(f"cannot make the folder {folder}: {why}") from error
    return folder
