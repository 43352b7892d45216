"""Ends the process group that a command's model has made, which its factory cannot know to be over.

Left to the end of the interpreter, one process may go while others still use the group, and abort.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def own_group_ended() -> Iterator[None]:
    """Destroy the default process group that was made in the body, once all processes are through.

    The body may end in SystemExit. Where it fails the group is left as it is: the other processes
    may be anywhere, and waiting for them would hang.
    """
    before = _is_initialized()
    try:
        yield
    except SystemExit as end:
        if not end.code and not before:
            _end()
        raise
    if not before:
        _end()


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _end() -> None:
    if not _is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # another process has failed, and says so itself
        dist.barrier()
    dist.destroy_process_group()
