"""The kernels of a call are compiled several at a time, and nothing is launched meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from freqopt.kernels import compiling
from freqopt.kernels.compiling import compile_first
from freqopt.kernels.tape import queued


class Kernel:
    """Notes what is done with it; compiling goes through Triton's own mode."""

    def __init__(self, fails: bool = False) -> None:
        self.done: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.fails, self.threads = fails, set[int]()
        self.together = threading.Barrier(2, timeout=30)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.done.append(("launched", grid, args))

    def warmup(self, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
        from triton.runtime._async_compile import active_mode

        def compiled() -> Kernel:
            self.threads.add(threading.get_ident())
            self.together.wait()  # one alone would wait for ever
            if self.fails:
                raise RuntimeError("does not compile")
            self.done.append(("compiled", grid, args))
            return self

        return active_mode.get().submit((id(self), args), compiled, lambda kernel: None)


@pytest.fixture(autouse=True)
def _workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "workers", lambda: 4)
    compiling._known.clear()
    yield
    compiling._known.clear()


def run_with(kernel: Kernel) -> Callable[[], None]:
    def run() -> None:
        for number in range(2):
            queued(kernel, (3, 5))(number)

    return run


def test_kernels_are_compiled_together_once_for_a_form() -> None:
    kernel = Kernel()
    run = run_with(kernel)
    compile_first("form", run)
    assert sorted(kernel.done) == [("compiled", (3, 5), (n,)) for n in range(2)]
    assert len(kernel.threads) == 2
    compile_first("form", run)
    assert len(kernel.done) == 2
    compile_first("another", run)
    assert len(kernel.done) == 4 and not compiling.is_compiling()
    run()
    assert kernel.done[4:] == [("launched", (3, 5), (n,)) for n in range(2)]


class Loaded(Kernel):
    """Notes, too, that it was loaded onto a GPU, and fails there if it is to."""

    broken = False

    @property
    def run(self) -> str:
        self.done.append(("loaded", (), ()))
        if self.broken:
            raise RuntimeError("too much shared memory")
        return "launcher"


@pytest.mark.parametrize("broken", [False, True])
def test_what_was_compiled_is_loaded_onto_the_gpu(
    broken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    current: list[int] = []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        current.append(number)
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel, other = Loaded(), Loaded(fails=True)
    kernel.broken = broken

    def run() -> None:
        run_with(kernel)()
        run_with(other)()

    compile_first("form", run)
    assert [what for what, _, _ in kernel.done] == ["compiled"] * 2 + ["loaded"] * 2
    assert not other.done  # it did not compile
    assert current == [3, 3] and not caplog.records


def test_what_does_not_compile_is_left_to_the_call() -> None:
    kernel = Kernel(fails=True)
    compile_first("form", run_with(kernel))
    assert not kernel.done and not compiling.is_compiling()


def test_what_fails_otherwise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def run() -> None:
        raise ValueError("nothing to launch")

    compile_first("form", run)
    assert "one at a time" in caplog.text and "nothing to launch" in caplog.text
    assert not compiling.is_compiling()


def test_another_thread_launches_meanwhile() -> None:
    kernel, beside = Kernel(), Kernel()

    def run() -> None:
        other = threading.Thread(target=run_with(beside))
        other.start()
        other.join()
        run_with(kernel)()

    compile_first("form", run)
    assert [what for what, _, _ in beside.done] == ["launched"] * 2
    assert [what for what, _, _ in kernel.done] == ["compiled"] * 2


def test_one_core_compiles_as_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "workers", lambda: 1)
    kernel = Kernel()
    compile_first("form", run_with(kernel))
    assert not kernel.done


@pytest.fixture
def _poison() -> Iterator[None]:
    """New memory holds the largest number there is."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("memory", [
    lambda: torch.empty(5, dtype=torch.int64),
    lambda: torch.empty_like(torch.ones(5, dtype=torch.int64)),
    lambda: torch.empty_strided((5,), (2,), dtype=torch.int64),
    lambda: torch.ones(5, dtype=torch.int64).new_empty(5),
])  # fmt: skip
def test_what_kernels_would_write_may_be_taken_for_places(
    memory: Callable[[], torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    table, seen = torch.arange(3, 10), []

    def run() -> None:
        places = memory()
        run_with(Kernel())()
        seen.append(table[places].tolist())
        seen.append(torch.full((2,), 7, dtype=torch.int64).tolist())

    assert int(memory()[0]) == torch.iinfo(torch.int64).max
    compile_first("form", run)
    assert seen == [[3] * 5, [7] * 2] and not caplog.records
    assert int(memory()[0]) == torch.iinfo(torch.int64).max


def test_many_forms_are_not_kept_for_ever() -> None:
    for form in range(3 * compiling.FORMS):
        compile_first(form, lambda: None)
    assert len(compiling._known) <= compiling.FORMS


SCRIPT = """
import json
from concurrent.futures import ThreadPoolExecutor
from freqopt.kernels.specialise import compile_specialised, specialisations
from freqopt.kernels.variant import Variant
variant = Variant(90, "float16", 64, False)
names = {"total", "centre", "h_bar", "limits", "merge", "route"}
jobs = [job for job in specialisations(variant) if job.name in names]
def made(job):
    return job.name, len(compile_specialised(job, variant).asm["ptx"])
alone = dict(map(made, jobs))
with ThreadPoolExecutor(4) as pool:
    together = dict(pool.map(made, jobs))
print(json.dumps([alone, together]))
"""


def test_triton_compiles_the_same_in_threads(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_ALWAYS_COMPILE": "1",
            "PYTHONPATH": str(root),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = json.loads(done.stdout)
    assert len(alone) == 6 and alone == together
