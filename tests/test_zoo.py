"""The zoo: procedural video that moves, a model that sees positions, training that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from freqopt.models_zoo import train as training
from freqopt.models_zoo.procedural import render_videos
from freqopt.models_zoo.sampling import denoising_samples, sample, time_steps
from freqopt.models_zoo.video_dit import (
    WEIGHTS,
    VideoDiT,
    VideoDiTConfig,
    load_pretrained,
    rotary_table,
    rotate,
    save_weights,
)

TINY = VideoDiTConfig(width=32, layers=2, mlp_width=64, rope_axes=(4, 6, 6))


def tiny_model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(TINY)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


def test_videos_are_in_range_reproducible_and_differ_by_seed() -> None:
    first = render_videos(2, 4, 24, 40, seed=3)
    assert first.shape == (2, 3, 4, 24, 40) and first.abs().max() <= 1
    assert torch.equal(first, render_videos(2, 4, 24, 40, seed=3))
    assert (first[0] - first[1]).abs().mean() > 0.05
    assert (first - render_videos(2, 4, 24, 40, seed=4)).abs().mean() > 0.05


def test_objects_move_and_near_frames_are_more_alike_than_far_ones() -> None:
    video = render_videos(8, 9, 36, 60, seed=1)
    near = (video[:, :, 1] - video[:, :, 0]).abs().mean()
    far = (video[:, :, 8] - video[:, :, 0]).abs().mean()
    assert near > 0.01 and far > 2 * near


def test_one_seed_is_one_scene_at_every_resolution_and_length() -> None:
    small = render_videos(2, 3, 30, 52, seed=2)
    large = render_videos(2, 5, 120, 208, seed=2)[:, :, ::2]
    pooled = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
    assert (small - pooled).abs().mean() < 0.25 * (small - small.mean((2, 3, 4), True)).abs().mean()


def test_default_model_fits_its_file_and_keeps_shapes() -> None:
    with torch.device("meta"):
        model = VideoDiT()
    assert sum(2 * p.numel() for p in model.parameters()) <= 15_900_000
    assert model.config.head_dim == 128 and model.config.layers * model.config.heads == 24
    video = torch.randn(2, 3, 3, 12, 20)
    assert tiny_model()(video, torch.rand(2)).shape == video.shape


def test_unpatchify_inverts_patchify() -> None:
    model = tiny_model()
    video = torch.randn(1, 3, 2, 8, 12)
    patches = video.unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 2, 3, 4, 1, 5, 6).flatten(4)
    with torch.no_grad():
        for block in model.blocks:
            block.table.zero_()
        model.modulation.weight.zero_()
        model.patchify.weight.zero_()
        model.patchify.bias.zero_()
    model.head = torch.nn.Identity()
    flat = patches.flatten(1, 3)

    class Given(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return flat

    model.head = Given()
    assert torch.equal(model(video, torch.zeros(1)), video)


def test_rotary_positions_are_relative() -> None:
    torch.manual_seed(0)
    table = rotary_table((3, 4, 5), TINY, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, TINY.head_dim)
    logits = rotate(query.expand(1, 1, 60, -1), table) @ rotate(key.expand(1, 1, 60, -1), table).mT
    lattice = logits.view(3, 4, 5, 3, 4, 5)
    assert torch.allclose(lattice[0, 0, 0, 1, 2, 3], lattice[1, 1, 1, 2, 3, 4], atol=1e-5)
    assert not torch.allclose(lattice[0, 0, 0, 1, 2, 3], lattice[0, 0, 0, 2, 1, 3], atol=1e-3)
    assert torch.allclose(rotate(query, table[:, :1]).norm(), query.norm(), atol=1e-5)


def test_model_traces_whole_and_for_every_size() -> None:
    model = tiny_model()
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((1, 3, 3, 12, 20), (2, 3, 5, 20, 28)):
            video, timestep = torch.randn(shape), torch.rand(shape[0])
            assert torch.allclose(compiled(video, timestep), model(video, timestep), atol=1e-5)
    assert len(graphs) <= 2


def test_sampler_walks_from_noise_to_video_and_is_deterministic() -> None:
    times = time_steps(10)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    model, done = tiny_model(), []
    shape = {"frames": 2, "height": 8, "width": 12, "steps": 3}
    video = sample(model, seed=5, callback=lambda i, n: done.append((i, n)), **shape)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(video, sample(model, seed=5, **shape))
    assert not torch.equal(video, sample(model, seed=6, **shape))


def test_sampler_recovers_a_straight_flow_exactly() -> None:
    target = render_videos(1, 2, 8, 12, seed=1)

    class Straight(torch.nn.Module):
        def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return (video - target) / timestep.view(-1, 1, 1, 1, 1)

    video = sample(Straight(), frames=2, height=8, width=12, steps=4)
    assert torch.allclose(video, target, atol=1e-4)


def test_denoising_samples_spread_over_the_trajectory() -> None:
    found = denoising_samples(tiny_model(), 4, frames=2, height=8, width=12, steps=8)
    times = [float(item["timestep"][0]) for item in found]
    assert len(found) == 4 and times == sorted(times, reverse=True)
    assert times[0] > 0.9 and times[-1] <= 0.5


def test_weights_round_trip_and_their_absence_is_explained(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "weights.safetensors"
    save_weights(model, path, trained_with="a test")
    loaded = load_pretrained(path=path)
    assert loaded.config == model.config and not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float())
    with pytest.raises(FileNotFoundError, match=r"models_zoo\.train"):
        load_pretrained(path=tmp_path / "none.safetensors")


def test_shipped_weights_beat_an_untrained_model() -> None:
    model = load_pretrained()
    assert WEIGHTS.stat().st_size <= 16_000_000
    video = render_videos(2, 5, 48, 80, seed=987_654)
    generator = torch.Generator().manual_seed(0)
    stage = training.Stage(1.0, 5, 48, 80, 2, 2.0)
    with torch.no_grad():
        loss = training.flow_loss(model, video, stage, generator)
    untrained = 1 + video.square().mean()
    assert loss < 0.4 * untrained


def test_training_stops_on_time_resumes_and_lowers_the_loss(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--smoke", "--device", "cpu", "--sample-steps", "2", "--out", str(out)]
    training.main([*arguments, "--minutes", "0.05"])
    first = json.loads((out / "train_log.json").read_text())
    training.main([*arguments, "--minutes", "0.12", "--resume"])
    second = json.loads((out / "train_log.json").read_text())
    assert second["steps"] > first["steps"] and second["seconds"] <= 0.12 * 60 + 3
    losses = [row[2] for row in second["log"]]
    assert losses[-1] < 0.8 * losses[0]
    assert load_pretrained(path=out / "video_dit.safetensors").config.width == 32
    assert (out / "sampled.png").stat().st_size > 500


@pytest.mark.parametrize(
    ("extra", "said"), [(["--resume"], "no checkpoint"), (["--device", "cuda"], "no CUDA device")]
)
def test_bad_training_arguments_are_refused(
    extra: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if extra[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        training.main(["--smoke", "--out", str(tmp_path), *extra])
    assert said in capsys.readouterr().err
