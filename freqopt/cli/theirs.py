"""Code of the user's own that a command runs: its errors are said as theirs, its prints stay away.

What a command prints on standard output is for other programs, so prints go to standard error.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

from freqopt.errors import FreqoptError, InputError

CLI = str(Path(__file__).parent)
PACKAGE = str(Path(__file__).parent.parent)
TORCH = str(Path(torch.__file__).parent)

LONGEST = 400
"""Characters of an error that are shown."""


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """In the body runs what the user wrote. what: said in front of an error of it.

    Raises:
        InputError: an error of theirs; one that came from freqopt itself is left as it is.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except FreqoptError:
        raise
    except (Exception, SystemExit) as error:
        if _is_ours(error):
            raise
        raise InputError(_in_two_lines(what, error)) from error


def _is_ours(error: BaseException) -> bool:
    """Whether freqopt failed, and not what it called: hooks of ours run in their code as well."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename
    return last.startswith(PACKAGE) and not last.startswith(CLI) and not _users(frames)


def _users(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Frames that are neither ours nor PyTorch's."""
    return [f for f in frames if not f.filename.startswith((PACKAGE, TORCH, "<frozen"))]


def _in_two_lines(what: str, error: BaseException) -> str:
    """What an error was, and where: the innermost frame that is neither ours nor PyTorch's."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if type(error).__module__.startswith("torch._dynamo"):  # pages about the one that it met
        frames += getattr(error, "real_stack", None) or ()
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
    at = (_users(frames) or frames)[-1]
    where = f"{at.filename}:{at.lineno}, in {at.name}"
    said = " ".join(str(error).split())
    if len(said) > LONGEST:
        said = f"{said[:LONGEST]} ..."
    return (
        f"{what}: {type(error).__name__}: {said}\n  at {where} (freqopt --traceback shows it all)"
    )
