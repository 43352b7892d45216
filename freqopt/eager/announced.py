"""Has diffusers know the attention backend "freqopt" as soon as both are imported, in any order.

`import freqopt` must not import diffusers, so where it is not there yet its import is waited for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

DISPATCHER = "diffusers.models.attention_dispatch"


def announce() -> None:
    """Register the backend now, or when diffusers' dispatcher is imported."""
    if DISPATCHER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds one module as others find it, once, and registers when it was run."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DISPATCHER:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = run_and_register
        return spec


def _register() -> None:
    try:
        importlib.import_module("freqopt.eager.dispatcher").register()
    except Exception as error:  # another version of diffusers must not fail to be imported
        logger.warning(
            "set_attention_backend('freqopt') is not there, as diffusers' dispatcher is another "
            "than the one that is known (%s: %s); freqopt.optimize works without",
            type(error).__name__,
            error,
        )
