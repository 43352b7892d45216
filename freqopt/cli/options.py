"""Arguments and options that several commands have, and the exit statuses of all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from freqopt.calibration.team import is_first_process

BAD_INPUT = 2
BROKEN = 1
INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="What makes the model: an importable module or a .py file, and a function in it that "
        "returns a torch.nn.Module when called without arguments (or the module itself).",
    ),
]
SamplesFile = Annotated[
    Path,
    typer.Option(
        "--samples",
        help="Inputs as safetensors, with tensors named '<call>/<argument>': '0/video', "
        "'0/timestep', '1/video', ...; other values as JSON in the metadata "
        "(freqopt.save_samples writes such files).",
    ),
]
GridText = Annotated[
    str | None,
    typer.Option(
        "--grid", help="Extents t,h,w of the video tokens, where the graph does not tell them."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cuda or cpu; cuda where there is one by default.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")]


def speaks() -> bool:
    """Whether this process prints and writes pages: of those that `torchrun` started, the first.

    Where the command loads no model, nobody has made a process group of them.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return is_first_process() and not (launched and os.environ.get("RANK", "0") != "0")
