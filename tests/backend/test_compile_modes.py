"""Ways to compile beside the plain one: checkpointing, adapters, another resolution, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpointed import Checkpointed
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

TINY = VideoDiTConfig(width=32, layers=2, mlp_width=64, rope_axes=(4, 6, 6))


def make_model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(TINY)
    nn.init.normal_(model.head.weight, std=0.2)
    nn.init.normal_(model.modulation.weight, std=0.3)
    return model


def compile_exact(model: nn.Module, inner: str, **options: Any) -> Any:
    torch._dynamo.reset()
    freqopt.reset_counters()
    given = {"threshold": 0.0, "min_tokens": 0, "inner": inner, "strict": True, **options}
    return torch.compile(model, backend=freqopt_backend, options=given, fullgraph=True)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_with_the_split_in_place(checkpointed: bool) -> None:
    model = make_model()
    if checkpointed:
        for i, block in enumerate(list(model.blocks)):
            model.blocks[i] = Checkpointed(block)
    video, timestep = torch.randn(1, 3, 4, 36, 44), torch.rand(1)
    grads = []
    for run in (model, compile_exact(model, "aot_eager")):
        model.zero_grad()
        run(video, timestep).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert freqopt.counters().split == 2
    assert len(grads[0]) == len(grads[1]) > 20
    for expected, got in zip(*grads, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-7


class Adapter(nn.Module):
    """A LoRA adapter around a linear layer (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return out


def test_adapters_do_not_hide_attention() -> None:
    model = make_model().eval()
    for block in model.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    video, timestep = torch.randn(1, 3, 4, 36, 44), torch.rand(1)
    with torch.no_grad():
        expected = model(video, timestep)
        out = compile_exact(model, "eager")(video, timestep)
    assert freqopt.counters().split == 2
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_a_plan_serves_other_resolutions_without_calibration() -> None:
    model = make_model().eval()

    def call(seed: int, frames: int, height: int, width: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        video = torch.randn(1, 3, frames, height, width, generator=generator)
        return {"video": video, "timestep": torch.full((1,), 0.2 * (seed % 4 + 1))}

    torch._dynamo.reset()
    samples = [call(i, 4, 36, 44) for i in range(4)]
    plan = freqopt.calibrate(model, samples, target_error=0.1, progress=False)
    assert plan.grids == [(4, 9, 11)]
    compiled = compile_exact(model, "eager", threshold=None, plan=plan, strict=False)
    split = sum(site.decision == "split" for site in plan.sites.values())
    assert split > 0
    for shape in ((4, 36, 44), (5, 52, 60), (3, 28, 84)):
        freqopt.reset_counters()
        inputs = call(9, *shape)
        with torch.no_grad():
            dense, out = model(**inputs), compiled(**inputs)
        assert freqopt.counters().split == split
        error = float((out - dense).norm() / dense.norm())
        assert 0 < error < 0.15


@pytest.mark.parametrize("name", ["flux", "cogvideox", "sd3"])
def test_projections_that_diffusers_fused(name: str) -> None:
    from dataclasses import replace

    from model_cases import Grid, Made, load_all
    from model_checks import look, problems

    case = load_all()[name]
    grid, batch = case.variant(0)

    def fused(grid: Grid, batch: int) -> Made:
        model, inputs = case.make(grid, batch)
        model.fuse_qkv_projections()
        assert any(
            key.endswith(("to_qkv.weight", "to_added_qkv.weight")) for key in model.state_dict()
        )
        return model, inputs

    assert not problems(case, grid, look(replace(case, make=fused), grid, batch))


def test_automatic_dynamic_shapes_compile_a_second_time_and_no_more() -> None:
    """By default the second size makes sizes symbols; two graphs then serve all."""
    from model_cases import load_all

    case = load_all()["wan"]
    torch.manual_seed(0)
    model, _ = case.make((3, 6, 10), 1)
    compiled = compile_exact(model, "eager")
    torch._dynamo.utils.counters.clear()
    for grid in ((3, 6, 10), (5, 7, 9), (4, 8, 6), (6, 5, 11), (7, 6, 9)):
        torch.manual_seed(1)
        _, inputs = case.make(grid, 1)
        freqopt.reset_counters()
        with torch.no_grad():
            got, expected = compiled(**inputs), model(**inputs)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
        assert (freqopt.counters().split, freqopt.counters().dense) == (2, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
