"""The command line under `torchrun`: all ranks run, one of them speaks and writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import FACTORY, engine
from parallel_models import uneven_plan

from freqopt.calibration.samples_file import save_samples
from freqopt.plan.plan import Plan

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow  # each starts two processes that import everything


def by_torchrun(*arguments: object) -> str:
    """What two processes of a command print."""
    paths = [str(ROOT), str(ROOT / "tests" / "support")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([*paths, *sys.path]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "freqopt"]
    done = subprocess.run(
        [*launch, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def common(tmp_path: Path) -> tuple[object, ...]:
    """Arguments of a command: a model that two ranks share, and calls of it."""
    _, call = engine()
    calls = [{"video": torch.randn(call["video"].shape)} for _ in range(2)]
    save_samples(tmp_path / "calls", calls)
    (tmp_path / "model.py").write_text(FACTORY)
    return f"{tmp_path}/model.py:make", "--samples", tmp_path / "calls", "--device", "cpu"


def test_calibrate_writes_one_plan(common: tuple[object, ...], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    target = ("--target-density", 0.7, "--rounds", 0, "-o", plan)
    assert by_torchrun("calibrate", *common, *target).count(f"wrote {plan}") == 1
    made = Plan.load(plan)
    assert [(site.heads, site.decision) for site in made.sites.values()] == [(4, "split")] * 2


def test_inspect_speaks_once(common: tuple[object, ...], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    uneven_plan(*engine()).save(plan)
    told = by_torchrun("inspect", *common, "--plan", plan)
    assert told.count("2 attention sites in 1 graph") == 1
    assert told.count("2 of 2 ranks x 16") == 1 and told.count("equal ranks") == 1


def test_report_writes_one_page(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    uneven_plan(*engine()).save(plan)
    told = by_torchrun("report", plan)
    assert told.count("wrote") == 1 and plan.with_suffix(".html").exists()
