"""Distilling to four steps: what is aimed at, that it learns, and the command as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freqopt.models_zoo import distilled
from freqopt.models_zoo.low_rank import LowRank, save_adapter
from freqopt.models_zoo.sampling import sample, time_steps
from freqopt.models_zoo.training import distil
from freqopt.models_zoo.training.loop import Stage
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

CPU = torch.device("cpu")
STAGE = Stage(1.0, 2, 12, 20, 4, 1.0)


def teacher() -> VideoDiT:
    torch.manual_seed(1)
    model = VideoDiT(
        VideoDiTConfig(width=32, layers=2, mlp_width=64, rope_axes=(4, 6, 6), data_std=0.45)
    )
    torch.nn.init.normal_(model.head.weight, std=0.3)  # untrained models end in zeros
    return model


def test_the_teachers_times_contain_the_students() -> None:
    every = time_steps(distil.STEPS * distil.SUBSTEPS)
    torch.testing.assert_close(every[:: distil.SUBSTEPS], time_steps(distil.STEPS))


def test_who_takes_the_teachers_mean_velocity_has_no_loss_and_ends_where_it_ends() -> None:
    def curved(state: Tensor, now: float) -> Tensor:
        return state * (now + 0.5) ** 2

    times = time_steps(24).tolist()
    noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def perfect(state: Tensor, now: float) -> Tensor:
        at = min(range(0, 24, 6), key=lambda i: abs(times[i] - now))
        return (distil.walk(curved, state, times[at : at + 7]) - state) / (
            times[at + 6] - times[at]
        )

    assert all(loss < 1e-10 for loss in distil.lessons(perfect, curved, noise))
    assert all(loss > 1e-4 for loss in distil.lessons(curved, curved, noise))
    ended = distil.walk(perfect, noise, time_steps(4).tolist())
    torch.testing.assert_close(ended, distil.walk(curved, noise, times))


def test_the_student_comes_closer_and_the_teacher_stays() -> None:
    distillation = distil.Distillation(teacher(), CPU, rank=4, rate=5e-3)
    before = {name: p.clone() for name, p in distillation.teacher.named_parameters()}
    first = distillation.judge(STAGE, (1, 2))
    assert first["the student's four"] == pytest.approx(first["four of the teacher's"])
    distillation.run((STAGE,), 1e6, most=60)
    last = distillation.judge(STAGE, (1, 2))
    assert last["four of the teacher's"] == pytest.approx(first["four of the teacher's"])
    assert last["the student's four"] < 0.5 * first["the student's four"]
    assert all(torch.equal(before[n], p) for n, p in distillation.teacher.named_parameters())


def test_a_loss_that_is_no_number_ends_it() -> None:
    distillation = distil.Distillation(teacher(), CPU, rank=2, rate=1e-3)
    layer = next(m for m in distillation.student.modules() if isinstance(m, LowRank))
    layer.up.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="lower --rate"):
        distillation.run((STAGE,), 1e6, most=2)


def test_the_command_writes_what_loads(tmp_path: Path) -> None:
    words = "--smoke --seconds 1000 --updates 3 --rank 2 --device cpu --out".split()
    distil.main([*words, str(tmp_path)])
    log = json.loads((tmp_path / "distil_log.json").read_text())
    assert log["updates"] == 3 and len(log["distance_to_24_steps"]) == 2
    assert (tmp_path / "distilled_student.png").exists()
    student = distilled.load_distilled(path=tmp_path / distilled.ADAPTER.name)
    plain = distilled.load_pretrained()
    assert list(student.state_dict()) == list(plain.state_dict()) and not student.training
    clip = sample(student, frames=2, height=8, width=12, steps=distilled.STEPS)
    off = clip - sample(plain, frames=2, height=8, width=12, steps=distilled.STEPS)
    assert 1e-4 < off.abs().max() < 1


def test_absent_and_foreign_adapters_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(FileNotFoundError, match=r"models_zoo\.training\.distil"):
        distilled.load_distilled(path=path)
    distillation = distil.Distillation(distilled.load_pretrained(), CPU, rank=1, rate=1e-3)
    save_adapter(distillation.student, path, base="of another")
    with pytest.raises(ValueError, match="distil anew"):
        distilled.load_distilled(path=path)
