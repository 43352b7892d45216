"""Training the zoo's model: the schedule, the loss, checkpoints, and the command as a whole."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freqopt.models_zoo.training.loop import (
    CPU_STAGES,
    GPU_STAGES,
    SMOKE_STAGES,
    Stage,
    State,
    Trainer,
    draw_times,
    flow_loss,
    learning_rate,
    stage_at,
)
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.models_zoo.training.train import SMOKE_CONFIG, main
from freqopt.models_zoo.video_dit import load_pretrained

CPU = torch.device("cpu")


@pytest.mark.parametrize("stages", [GPU_STAGES, CPU_STAGES, SMOKE_STAGES])
def test_stages_grow_and_share_the_time(stages: tuple[Stage, ...]) -> None:
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    sizes = [stage.frames * stage.height * stage.width for stage in stages]
    assert sizes == sorted(sizes)
    assert all(stage.height % 4 == 0 and stage.width % 4 == 0 for stage in stages)
    assert [stage_at(stages, at) for at in (0.0, 0.999, 1.5)] == [
        0,
        len(stages) - 1,
        len(stages) - 1,
    ]


def test_last_stage_is_the_size_that_the_demo_samples() -> None:
    last = GPU_STAGES[-1]
    assert (last.frames, last.height // 4, last.width // 4) == (21, 30, 52)


def test_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate(1e-3, 0, 0.0) == pytest.approx(5e-6)
    assert learning_rate(1e-3, 1000, 0.0) == pytest.approx(1e-3)
    assert learning_rate(1e-3, 1000, 0.5) == pytest.approx(5.05e-4)
    assert learning_rate(1e-3, 1000, 1.0) == pytest.approx(1e-5)


def test_times_cover_the_interval_even_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.cat([draw_times(1, step, 1.0, generator) for step in range(500)])
    assert plain.min() > 0 and plain.max() < 1
    assert abs(float(plain.mean()) - 0.5) < 0.02
    assert plain.min() < 0.08 and plain.max() > 0.92
    shifted = torch.cat([draw_times(1, step, 3.0, generator) for step in range(500)])
    assert shifted.mean() > plain.mean() + 0.1
    batch = draw_times(8, 0, 1.0, generator).sort().values
    assert batch.diff().max() < 0.35


def test_loss_is_zero_for_the_true_velocity() -> None:
    video = render_videos(2, 2, 8, 12, seed=0)

    class True_(torch.nn.Module):
        def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
            t = t.view(-1, 1, 1, 1, 1)
            return (noisy - video) / t

    generator = torch.Generator().manual_seed(0)
    loss = flow_loss(True_(), video, torch.tensor([0.3, 0.9]), generator)
    assert loss < 1e-10


def test_training_learns(tmp_path: Path) -> None:
    """The loss on one small kind of video falls well below that of the linear guess."""
    torch.manual_seed(0)
    state = State(SMOKE_CONFIG, CPU, seed=0, rate=3e-3)
    stage = Stage(1.0, 2, 16, 24, 4, 1.0)
    trainer = Trainer(state, (stage,), device=CPU, seed=0, rate=3e-3, compiled=False)
    trainer.run(seconds=1e6, started=0.0, out=tmp_path, stop=lambda: state.step >= 240)
    losses = [row.loss for row in state.log]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_failed_compilation_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_blocks(model: torch.nn.Module) -> None:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend=lambda *given: 1 / 0)

    torch._dynamo.reset()
    monkeypatch.setattr("freqopt.models_zoo.training.loop.compile_blocks", break_blocks)
    state = State(SMOKE_CONFIG, CPU, seed=0, rate=1e-3)
    trainer = Trainer(state, SMOKE_STAGES, device=CPU, seed=0, rate=1e-3, compiled=True)
    with pytest.warns(UserWarning, match="compiling the block failed"):
        trainer.run(seconds=1e6, started=0.0, out=tmp_path, stop=lambda: state.step >= 2)
    assert state.step == 2
    assert any(said.startswith("eager from stage") for said in state.notes)


def test_wrong_compiled_gradients_are_told_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        return lambda *given: tuple(3 * part for part in graph(*given))

    def compile_wrongly(model: torch.nn.Module) -> None:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr("freqopt.models_zoo.training.loop.compile_blocks", compile_wrongly)
    state = State(SMOKE_CONFIG, CPU, seed=0, rate=1e-3)
    trainer = Trainer(state, SMOKE_STAGES, device=CPU, seed=0, rate=1e-3, compiled=True)
    with pytest.warns(UserWarning, match="compiled gradients are off"):
        trainer.first_step(0)
    found = [p.grad.clone() for p in state.model.parameters() if p.grad is not None]
    state.optimiser.zero_grad(set_to_none=True)
    Trainer(state, SMOKE_STAGES, device=CPU, seed=0, rate=1e-3, compiled=False).step(0)
    expected = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not trainer.compiled


def test_checkpoint_holds_everything(tmp_path: Path) -> None:
    state = State(SMOKE_CONFIG, CPU, seed=0, rate=1e-3)
    trainer = Trainer(state, SMOKE_STAGES, device=CPU, seed=0, rate=1e-3, compiled=False)
    trainer.run(seconds=1e6, started=0.0, out=tmp_path, stop=lambda: state.step >= 20)
    again = State(SMOKE_CONFIG, CPU, seed=1, rate=1e-3)
    again.load(tmp_path / "checkpoint.pt", CPU)
    assert (again.step, again.log, again.notes) == (20, state.log, state.notes)
    for ours, theirs in ((state.model, again.model), (state.average, again.average)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    moments = again.optimiser.state_dict()["state"]
    for index, one in state.optimiser.state_dict()["state"].items():
        assert torch.equal(one["exp_avg"], moments[index]["exp_avg"])
    assert not list(tmp_path.glob("*.part"))


def test_command_trains_resumes_and_writes_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--smoke", "--device", "cpu", "--sample-steps", "2"]
    interrupt = threading.Timer(4.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    interrupt.start()
    main([*words, "--minutes", "5"])
    interrupt.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert "go on with --resume" in capsys.readouterr().out
    assert not (tmp_path / "video_dit.safetensors").exists()
    used = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < used["seconds"] < 60 and used["step"] > 0

    with pytest.raises(SystemExit):
        main([*words, "--minutes", "5"])
    assert "--resume" in capsys.readouterr().err

    minutes = (used["seconds"] + 3) / 60
    main([*words, "--minutes", str(minutes), "--resume"])
    log = json.loads((tmp_path / "train_log.json").read_text())
    assert log["steps"] > used["step"]
    assert log["seconds"] < used["seconds"] + 30
    assert log["validation_loss"] > 0
    assert "--resume" in log["command"]
    with (tmp_path / "train_log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps)) and steps[-1] > used["step"] - 20
    model = load_pretrained(path=tmp_path / "video_dit.safetensors")
    assert model.config == SMOKE_CONFIG
    for name in ("sampled.png", "training_video.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_command_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        (["--minutes", "0"], "must be positive"),
        (["--resume"], "no checkpoint"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device cpu")]),
    ]:
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "run"), *words])
        assert said in capsys.readouterr().err
