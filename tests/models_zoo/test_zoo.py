"""The zoo: what its videos look like, what its model computes, how it is sampled and stored."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.models_zoo.sampling import denoising_samples, initial_noise, sample, time_steps
from freqopt.models_zoo.training.contact_sheet import write_contact_sheet
from freqopt.models_zoo.training.procedural import OBJECTS, make_scenes, render_videos
from freqopt.models_zoo.training.train import CONFIG, DATA_STD
from freqopt.models_zoo.video_dit import (
    MAX_BYTES,
    VideoDiT,
    VideoDiTConfig,
    load_pretrained,
    precondition,
    rotary_table,
    rotate,
    save_weights,
)

TINY = VideoDiTConfig(
    width=32, layers=2, heads=2, mlp_width=48, rope_axes=(4, 6, 6), data_std=DATA_STD
)


def tiny_model(config: VideoDiTConfig = TINY, seed: int = 0) -> VideoDiT:
    """A small model with no zero weights, so that every part of it shows in the output."""
    torch.manual_seed(seed)
    model = VideoDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def clip(*, batch: int = 2, frames: int = 3, height: int = 20, width: int = 28) -> Tensor:
    return torch.randn(batch, 3, frames, height, width)


# Procedural video.


def test_videos_have_the_shape_and_range_asked_for() -> None:
    video = render_videos(3, 5, 30, 52, seed=1)
    assert video.shape == (3, 3, 5, 30, 52)
    assert video.dtype == torch.float32
    assert video.isfinite().all() and video.abs().max() <= 1
    assert video.std() > 0.2


def test_same_seed_same_video_and_other_seed_other_video() -> None:
    first = render_videos(2, 3, 16, 24, seed=4)
    assert torch.equal(first, render_videos(2, 3, 16, 24, seed=4))
    assert (first - render_videos(2, 3, 16, 24, seed=5)).abs().mean() > 0.1
    assert (first[0] - first[1]).abs().mean() > 0.1


def test_everything_moves_a_little_from_frame_to_frame() -> None:
    video = render_videos(6, 21, 60, 104, seed=2)
    steps = (video[:, :, 1:] - video[:, :, :-1]).abs().mean(dim=(1, 2, 3, 4))
    ends = (video[:, :, -1] - video[:, :, 0]).abs().mean(dim=(1, 2, 3))
    assert (steps > 1e-3).all()
    assert (steps < ends / 2).all()


def test_a_scene_is_the_same_at_every_resolution_and_length() -> None:
    small = render_videos(4, 3, 60, 104, seed=6)
    large = render_videos(4, 5, 120, 208, seed=6)
    shrunk = F.avg_pool3d(large[:, :, ::2], (1, 2, 2))
    other = render_videos(4, 3, 60, 104, seed=7)
    assert (small - shrunk).abs().mean() < 0.02
    assert (small - other).abs().mean() > 0.2


def test_later_objects_occlude_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two flat discs at the centre: only the colour of the later one is seen there."""
    scene = make_scenes(1, 0)
    flat = scene.surface._replace(
        dark=torch.linspace(-0.9, 0.9, OBJECTS)[None, :, None].expand(1, OBJECTS, 3),
        light=torch.linspace(-0.9, 0.9, OBJECTS)[None, :, None].expand(1, OBJECTS, 3),
    )
    still = torch.zeros_like(scene.velocity)
    scene = scene._replace(
        position=still,
        velocity=still,
        acceleration=still,
        petals=torch.zeros(1, OBJECTS),
        pan=torch.zeros(1, 2),
        surface=flat,
        radius=torch.full((1, OBJECTS), 0.3),
    )
    monkeypatch.setattr("freqopt.models_zoo.training.procedural.make_scenes", lambda *a: scene)
    centre = render_videos(1, 1, 41, 41)[0, :, 0, 20, 20]
    # 0.9, the last object's colour, under a light of 0.85 at the centre.
    torch.testing.assert_close(centre, torch.full((3,), 1.9 * 0.85 - 1), atol=0.02, rtol=0)


def test_data_std_of_the_shipped_model_is_that_of_the_videos() -> None:
    measured = render_videos(24, 3, 30, 52, seed=11).square().mean().sqrt()
    assert abs(float(measured) - DATA_STD) < 0.08


# The model.


@pytest.mark.parametrize("shape", [(1, 1, 8, 12), (2, 3, 20, 28)])
def test_velocity_has_the_shape_of_the_video(shape: tuple[int, int, int, int]) -> None:
    batch, frames, height, width = shape
    video = clip(batch=batch, frames=frames, height=height, width=width)
    out = tiny_model()(video, torch.rand(batch))
    assert out.shape == video.shape and out.dtype == video.dtype
    assert out.isfinite().all()


def test_parameters_fit_the_budget() -> None:
    with torch.device("meta"):
        model = VideoDiT(CONFIG)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 7_000_000 < count <= 7_900_000
    assert 2 * count < MAX_BYTES - 100_000
    assert CONFIG.layers * CONFIG.heads == 24 and CONFIG.head_dim == 128


def test_unpatchify_undoes_patchify() -> None:
    """With a patchifier and a head that copy pixels, the model returns each pixel to its place."""
    config = VideoDiTConfig(width=48, layers=0, heads=1, rope_axes=(16, 16, 16))
    model = tiny_model(config)
    video = clip(height=12, width=20)
    with torch.no_grad():
        model.patchify.weight.copy_(torch.eye(48).view(48, 3, 1, 4, 4))
        assert model.patchify.bias is not None
        model.patchify.bias.zero_()
        model.final_table.zero_()
        model.time[2].weight.zero_()
        model.time[2].bias.zero_()
        model.head.weight.copy_(torch.eye(48))
        model.head.bias.zero_()
    out = model(video, torch.zeros(2))
    patches = video.unfold(3, 4, 4).unfold(4, 4, 4)
    mean = patches.mean(dim=(1, 5, 6), keepdim=True)
    spread = ((patches - mean).square().mean(dim=(1, 5, 6), keepdim=True) + 1e-5).sqrt()
    expected = ((patches - mean) / spread).transpose(4, 5).flatten(5, 6).flatten(3, 4)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_rotary_products_depend_on_the_offset_alone() -> None:
    config = VideoDiTConfig(width=96, heads=2, rope_axes=(16, 16, 16))
    grid = (4, 5, 6)
    table = rotary_table(grid, config, torch.device("cpu"))
    query, key = torch.randn(2, 48)
    products = (
        rotate(query.expand(1, 1, 120, 48), table) @ rotate(key.expand(1, 1, 120, 48), table).mT
    ).view(*grid, *grid)
    torch.testing.assert_close(products[1, 2, 3, 3, 3, 1], products[0, 1, 5, 2, 2, 3])
    torch.testing.assert_close(products[0, 0, 0, 1, 1, 1], products[2, 3, 4, 3, 4, 5])
    assert (products[0, 0, 0, 1, 0, 0] - products[0, 0, 0, 0, 1, 0]).abs() > 1e-3
    rotated = rotate(query.expand(1, 1, 120, 48), table)
    torch.testing.assert_close(rotated.norm(dim=-1), query.norm().expand(1, 1, 120))


def test_precondition_is_the_best_linear_guess_and_its_error() -> None:
    std = 0.45
    generator = torch.Generator().manual_seed(0)
    video = std * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for time in (0.02, 0.3, 0.7, 0.98):
        seen, velocity = (1 - time) * video + time * noise, noise - video
        kept, scaled = precondition(torch.tensor(time, dtype=torch.float64), std)
        slope = (seen * velocity).mean() / seen.square().mean()
        assert abs(kept - slope) < 0.02
        assert abs((velocity - kept * seen).std() / scaled - 1) < 0.01


def test_attention_sees_every_token_and_the_timestep_matters() -> None:
    model = tiny_model()
    video = clip(batch=1)
    moved = video.clone()
    moved[..., -1, -4:, -4:] += 1.0
    time = torch.tensor([0.5])
    change = (model(moved, time) - model(video, time)).abs()
    assert change[..., 0, :4, :4].max() > 1e-6
    assert (model(video, torch.tensor([0.9])) - model(video, time)).abs().max() > 1e-3


def test_items_of_a_batch_do_not_mix() -> None:
    model, video, time = tiny_model(), clip(), torch.tensor([0.2, 0.8])
    alone = torch.cat([model(video[i : i + 1], time[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model(video, time), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_model_is_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    for frames, height, width in [(3, 20, 28), (5, 12, 36)]:
        video, time = clip(frames=frames, height=height, width=width), torch.rand(2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(video, time), model(video, time))


def test_all_blocks_share_one_compiled_graph_in_training() -> None:
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    model = tiny_model()
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(clip(), torch.rand(2)).square().mean().backward()
    assert counter.frame_count == 1


# Weights.


@pytest.mark.smoke
def test_weights_come_back_as_saved(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    save_weights(model, tmp_path / "weights.safetensors", trained_with="a test")
    again = load_pretrained(path=tmp_path / "weights.safetensors", dtype=torch.bfloat16)
    assert again.config == TINY and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_absent_and_damaged_weights_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(FileNotFoundError, match=r"install it again.*models_zoo\.training\.train"):
        load_pretrained(path=path)
    save_weights(tiny_model(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="does not hold weights"):
        load_pretrained(path=path)


# Sampling.


def test_time_steps_fall_from_noise_to_video() -> None:
    times = time_steps(10)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 11
    assert (times.diff() < 0).all()
    assert -times.diff()[0] < 0.05 and -times.diff()[-1] > 0.2
    torch.testing.assert_close(time_steps(4, shift=1.0), torch.linspace(1, 0, 5))


class Exact(torch.nn.Module):
    """The true velocity towards one video: any number of Euler steps must land on it."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
        return (video - self.target) / timestep.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_sampler_follows_the_flow_to_its_end(steps: int) -> None:
    target = render_videos(2, 3, 8, 12, seed=3)
    video = sample(Exact(target), frames=3, height=8, width=12, batch=2, steps=steps, seed=1)
    torch.testing.assert_close(video, target, atol=1e-5, rtol=1e-5)


def test_sampler_is_deterministic_and_tells_its_progress() -> None:
    model, told = tiny_model(), []
    settings = {"frames": 2, "height": 8, "width": 12, "steps": 3}
    first = sample(model, **settings, seed=7, callback=lambda *at: told.append(at))  # type: ignore[arg-type]
    assert torch.equal(first, sample(model, **settings, seed=7))  # type: ignore[arg-type]
    assert not torch.equal(first, sample(model, **settings, seed=8))  # type: ignore[arg-type]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert first.shape == (1, 3, 2, 8, 12) and first.abs().max() <= 1


def test_denoising_samples_are_what_the_model_meets() -> None:
    model = tiny_model()
    size = {"frames": 2, "height": 8, "width": 12}
    taken = denoising_samples(model, 4, **size, steps=8, seed=20)
    assert [set(one) for one in taken] == [{"video", "timestep"}] * 4
    times = [float(one["timestep"]) for one in taken]
    assert times == sorted(times, reverse=True) and len(set(times)) == 4
    for one in taken:
        assert model(**one).shape == (1, 3, 2, 8, 12)
    # The first step's input is noise itself, and every other sample is of the second trajectory.
    early = denoising_samples(model, 8, **size, steps=8, seed=20)
    assert torch.equal(early[0]["video"], initial_noise(1, 2, 8, 12, seed=20, device="cpu"))
    other = initial_noise(1, 2, 8, 12, seed=21, device="cpu")
    assert (early[1]["video"] - other).abs().mean() < (
        early[1]["video"] - early[0]["video"]
    ).abs().mean()


# Contact sheets.


def test_contact_sheet_is_a_png_of_the_frames(tmp_path: Path) -> None:
    video = torch.linspace(-1, 1, 4).view(1, 4, 1, 1).expand(3, 4, 2, 3)
    path = tmp_path / "sheet.png"
    write_contact_sheet(video, path, frames=2, zoom=1)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (6, 2)
    start = data.index(b"IDAT") + 4
    lines = zlib.decompress(data[start : data.index(b"IEND") - 8])
    assert lines == (b"\0" + b"\0" * 9 + b"\xff" * 9) * 2
