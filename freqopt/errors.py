"""Exceptions of freqopt. Every message says what was seen, what is supported and what to do."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FreqoptError(Exception):
    """Base of every error that freqopt raises on purpose."""


class InputError(FreqoptError, ValueError):
    """Tensors or arguments that split attention cannot work on (shapes, dtypes, grid, text)."""


class OptionError(FreqoptError, ValueError):
    """An unknown or malformed option of the backend, of calibration or of the command line."""


class PlanError(FreqoptError, ValueError):
    """A plan that is truncated, edited by hand, of another version or made for another model."""


class FileError(FreqoptError, OSError):
    """A file that cannot be written: a folder in its place, no rights, no space."""


class SiteError(FreqoptError, RuntimeError):
    """A site that should be split and is not; raised only under ``strict=True``."""


class CalibrationError(FreqoptError, RuntimeError):
    """Samples that calibration cannot use, or a target that it could not meet."""


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise errors of freqopt as they are, not as what torch.compile makes of them."""
    try:
        yield
    except Exception as error:
        cause = getattr(error, "inner_exception", None) or error.__cause__
        if isinstance(cause, FreqoptError):
            raise cause from None
        raise


@contextmanager
def through_compiler() -> Iterator[None]:
    """Let errors of freqopt leave a torch.compile backend as themselves.

    Dynamo wraps what a backend raises into its BackendCompilerFailed, which no ``except`` of a user
    names, but for exceptions of a kind of its own; errors are given that kind beside theirs.
    """
    try:
        yield
    except FreqoptError as error:
        kind: Any = type(error)
        passing: FreqoptError = _passing_kind(kind)(str(error))
        # Frames before the backend's own are Dynamo's, which it then leaves out.
        backend = error.__traceback__ and error.__traceback__.tb_next
        frame = backend and backend.tb_frame
        passing.__dict__.update(error.__dict__, message=str(error), first_useful_frame=frame)
        raise passing.with_traceback(error.__traceback__) from error.__cause__


@functools.cache
def _passing_kind(kind: type[FreqoptError]) -> type[FreqoptError]:
    """A subclass of an error that Dynamo lets through, and that prints like the error."""
    from torch._dynamo.exc import ShortenTraceback

    def init(self: Any, message: str) -> None:
        Exception.__init__(self, message)

    def said(self: Any) -> str:  # Dynamo adds paragraphs of its own to `args`
        return str(self.message)

    def reduced(self: Any) -> tuple[Any, ...]:
        return kind, (self.message,)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    body = {**names, "__init__": init, "__str__": said, "__reduce__": reduced}
    return type(kind.__name__, (kind, ShortenTraceback), body)
