"""What exports of one process have in common is made once.

Builds share their objects: the same few sources are in most of what is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from compile_once import write_compiler
from quick_compilers import symbols_computed_anew, translations_read_once

from freqopt.exporters.onnx.library import compiler
from freqopt.exporters.problems import NotAvailableError


@pytest.fixture(scope="session", autouse=True)
def _compile_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """$CXX keeps objects for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(NotAvailableError):  # those who need one say so
            patch.setenv("CXX", str(write_compiler(shared / "objects", compiler())))
        yield


@pytest.fixture(scope="session", autouse=True)
def _translations_read_once() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # those who need it say so
            stack.enter_context(translations_read_once())
        yield


@pytest.fixture(scope="module")
def symbols() -> Iterator[None]:
    """For exports whose extents are free."""
    with symbols_computed_anew():
        yield
