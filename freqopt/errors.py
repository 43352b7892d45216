"""Exceptions of freqopt. Every message says what was seen, what is supported and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FreqoptError(Exception):
    """Base of every error that freqopt raises on purpose."""


class InputError(FreqoptError, ValueError):
    """Tensors or arguments that split attention cannot work on (shapes, dtypes, grid, text)."""


class OptionError(FreqoptError, ValueError):
    """An unknown or malformed option of the backend, of calibration or of the command line."""


class PlanError(FreqoptError, ValueError):
    """A plan that is truncated, edited by hand, of another version or made for another model."""


class SiteError(FreqoptError, RuntimeError):
    """A site that could not be rewritten; raised only under ``strict=True``."""


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
