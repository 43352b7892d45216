"""Scripts in processes of their own that start in no time: forks of one that has imported it all.

Triton decides at its import whether kernels are interpreted, so what interprets or compiles them
needs a process that no other test shares. A start of one takes longer than most of what is run;
here a process of each kind, started once, imports what all of them need and forks for each.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quick_compilers import prepare_compilers

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"

COMMON = (
    "torch._dynamo",
    "triton.compiler",
    "freqopt.kernels.op",
    "freqopt.kernels.specialise",
    "freqopt.kernels.forward.split",
)
INTERPRETED = ("hypothesis", "pytest", "triton.runtime.interpreter", "attention_cases")


class Forks:
    """Runs scripts, one after the other; interpret: with Triton's interpreter."""

    def __init__(self, interpret: bool) -> None:
        modules = (*COMMON, *INTERPRETED) if interpret else COMMON
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TRITON_INTERPRET": str(int(interpret)),
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # the other check leaves forks without CUDA
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT), *filter(None, sys.path)]),
            },
            start_new_session=True,
        )

    def run(
        self, *command: object, given: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """As ``python *command``, a script or ``-m`` and a module; given: what it reads.

        It runs at the root of the checkout and finds `tests/support`. environment: what is changed.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, name) for name in ("in", "out", "err")]
            paths[0].write_text(given)
            request = {
                "command": list(map(str, command)),
                "streams": list(map(str, paths)),
                "environment": environment,
            }
            try:
                print(json.dumps(request), file=self._server.stdin, flush=True)
                code = int(self._server.stdout.readline())
            except BaseException:
                self.close()  # or what was left running would answer the next one
                raise
            out, err = (path.read_text() for path in paths[1:])
        return subprocess.CompletedProcess(list(command), code, out, err)

    def close(self) -> None:
        """End the process and what it runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        forks.cache_clear()


@functools.cache
def forks(*, interpret: bool) -> Forks:
    """The process of this kind, for as long as the tests run."""
    made = Forks(interpret)
    atexit.register(made.close)
    return made


def serve(modules: Sequence[str]) -> None:
    """Import modules, then run what each line of standard input asks for, and tell how it ended."""
    for name in modules:
        importlib.import_module(name)
    prepare_compilers()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(request: dict[str, Any]) -> None:
    """Run a script or a module in this process, and end it."""
    code = 1
    try:
        read, *written = request["streams"]
        os.dup2(os.open(read, os.O_RDONLY), 0)
        for stream, path in enumerate(written, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdin = os.fdopen(0)
        for name, value in request["environment"].items():
            os.environ[name] = value
        os.chdir(ROOT)
        name, *sys.argv = request["command"]
        if name == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv.insert(0, name)
            runpy.run_path(name, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1:])
