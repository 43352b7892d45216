"""Two processes that stand for two GPUs: gloo on a CPU, started once for all tests of a module.

Functions of tests are called on both at once, by name, with what `pickle` can carry; what they
return, or how they failed, comes back from both.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = str(Path(__file__).parents[2])

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.tensor",
    "diffusers.hooks.context_parallel",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_wan",
    "freqopt.calibration.calibrate",
    "freqopt.inspection",
    "freqopt.parallel",
]
"""Modules that the processes have in common, imported once."""

WAIT = 500.0
"""Seconds after which a call that has not come back is one that hangs."""


class Ranks:
    """Processes of one group; use as ``with Ranks(2) as ranks: ranks.call(function, *args)``."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._start()

    def _start(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        port = _free_port()
        for rank in range(self.count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve,
                args=(rank, self.count, port, theirs, [ROOT, *sys.path]),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What a function of a test module returns on every rank, in their order.

        Raises:
            AssertionError: it failed on one, with that one's traceback, or hung.
        """
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, problems = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(5.0 if problems else WAIT):
                problems.append(f"rank {rank} did not come back")
                continue
            try:
                good, found = pipe.recv()
            except EOFError:
                good, found = False, "the process ended"
            if good:
                results.append(found)
            else:
                problems.append(f"rank {rank}: {found}")
        if problems:
            self.close()
            self._start()  # collectives may be left half done
            raise AssertionError("\n".join(problems))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(rank: int, count: int, port: int, pipe: Connection, paths: list[str]) -> None:
    sys.path[:] = paths
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count)
    )
    import torch
    import torch.distributed as dist
    from quick_compilers import prepare_compilers

    torch.set_num_threads(1)
    prepare_compilers()
    dist.init_process_group("gloo", rank=rank, world_size=count)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            answer = True, function(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
