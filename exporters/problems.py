"""What can go wrong in exporting and in running what was exported."""

from __future__ import annotations

from freqopt.errors import FreqoptError


class ExportError(FreqoptError, RuntimeError):
    """A model that cannot be exported as asked: control flow, an opset, a shape, a site."""


class NotAvailableError(FreqoptError, RuntimeError):
    """A compiler, package, device or part of freqopt that this machine lacks."""


class ArtifactError(FreqoptError, ValueError):
    """An exported folder that is incomplete, tampered with, or made for another machine."""
