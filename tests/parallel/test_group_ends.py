"""The process group of a command's model is gone when the command is through, on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import FACTORY, engine
from ranks import Ranks

from freqopt.calibration.samples_file import save_samples
from freqopt.cli.app import main
from freqopt.cli.groups import own_group_ended
from freqopt.errors import FreqoptError


@pytest.fixture
def two() -> Iterator[Ranks]:
    with Ranks(2) as found:
        yield found


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Inspects a model that two ranks share."""
    save_samples(tmp_path / "calls", [{"video": torch.randn(engine()[1]["video"].shape)}] * 2)
    (tmp_path / "model.py").write_text(FACTORY)
    model, samples = f"{tmp_path}/model.py:make", str(tmp_path / "calls")
    return ["inspect", model, "--samples", samples, "--device", "cpu"]


Initialise = Callable[[str], None]


def without_group(store: str) -> Initialise:
    """As a process begins; what makes the next group.

    By way of a file: it needs no port, which another program may have taken meanwhile.
    """
    made, rank, count = dist.init_process_group, dist.get_rank(), dist.get_world_size()

    def initialise(backend: str) -> None:
        made(backend, init_method=f"file://{store}", rank=rank, world_size=count)

    dist.barrier()
    dist.destroy_process_group()
    return initialise


def ran(arguments: list[str], *, before: bool, store: str) -> tuple[object, bool]:
    """How a command ended, and whether there is a group afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        if not before:
            patch.setattr(dist, "init_process_group", without_group(store))
        with pytest.raises(SystemExit) as end:
            main(arguments)
    return end.value.code, dist.is_initialized()


@pytest.mark.parametrize("before", [False, True])
def test_a_group_that_the_command_made_is_destroyed(
    two: Ranks, command: list[str], before: bool, tmp_path: Path
) -> None:
    """One that was there before is another's."""
    ended = two.call(ran, command, before=before, store=str(tmp_path / "store"))
    assert ended == [(0, before)] * 2


ERRORS: list[BaseException] = [SystemExit(2), FreqoptError("no"), KeyboardInterrupt()]


def failed(store: str, number: int) -> None:
    """A command that fails on the second rank alone."""
    rank, initialise = dist.get_rank(), without_group(store)
    if rank == 0:
        initialise("gloo")
    else:
        with pytest.raises(type(ERRORS[number])), own_group_ended():
            initialise("gloo")
            raise ERRORS[number]
    dist.barrier()  # the first that either is in


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_a_command_that_failed_waits_for_nobody(two: Ranks, tmp_path: Path, number: int) -> None:
    two.call(failed, str(tmp_path / "store"), number)


def one_dies(store: str) -> bool:
    initialise = without_group(store)
    with own_group_ended():
        initialise("gloo")
        dist.barrier()
        if dist.get_rank() == 1:
            os._exit(2)
    return dist.is_initialized()


def test_a_rank_that_is_through_does_not_hang_where_another_died(
    two: Ranks, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="rank 1: the process ended") as error:
        two.call(one_dies, str(tmp_path / "store"))
    assert "rank 0" not in str(error.value)
