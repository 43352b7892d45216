"""Sites in the bodies of activation checkpoints: sizes and budgets reach them from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import test_calibration_timestep as timed
import torch
from checkpointed import Checkpointed
from passes_toys import WIDTH, Attention, conv3d_tokens, text, video
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.passes.bodies import way_into


class Blocks(nn.Module):
    """A video and text made into tokens outside, and two attentions in bodies of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.blocks = nn.ModuleList(Checkpointed(Attention()) for _ in range(2))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([conv3d_tokens(video, self.weight), text], 1)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_sizes_reach_the_body_of_a_checkpoint(inner: str) -> None:
    """Symbolic ones, as many sizes are served by one graph; values and gradients are the same."""
    model = Blocks()
    options = {"threshold": 0.0, "min_tokens": 0, "strict": True, "inner": inner}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    freqopt.reset_counters()
    compiled = torch.compile(
        model, backend=freqopt_backend, options=options, dynamic=True, fullgraph=True
    )
    for grid, length in (((5, 6, 10), 7), ((4, 7, 9), 11)):
        inputs, found = (video(grid, 2), text(length, 2)), []
        for run in (model, compiled):
            model.zero_grad()
            out = run(*inputs)
            out.square().mean().backward()
            found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        largest = max(float(tensor.abs().max()) for tensor in found[0])
        for mine, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest)
    assert freqopt.counters().split == 4
    assert inner != "eager" or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_budgets_by_timestep_reach_the_body_of_a_checkpoint() -> None:
    torch.manual_seed(0)
    config = timed.VideoDiTConfig(width=32, layers=2, mlp_width=64, rope_axes=(4, 6, 6))
    model = timed.VideoDiT(config).eval()
    nn.init.normal_(model.head.weight, std=0.2)
    options = {"inner": "eager", "min_tokens": 0, "strict": True}

    def outputs(plan: Any, times: Sequence[float]) -> list[Tensor]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        given = {**options, "plan": plan}
        step = torch.compile(model, backend=freqopt_backend, options=given, fullgraph=True)
        found = [step(timed.video(), torch.tensor([time])).detach() for time in times]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        return found

    wanted = [
        outputs(timed.make_plan(model, only=bucket), [time])[0]
        for bucket, time in enumerate(timed.TIMES)
    ]
    for block in model.blocks:
        block.__class__ = _checkpointed(type(block))
    for out, want in zip(outputs(timed.make_plan(model), timed.TIMES), wanted, strict=True):
        assert (out - want).norm() < 1e-5 * want.norm()


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any) -> Any:
        return checkpoint(kind.forward, self, *args, use_reentrant=False)

    return type(kind.__name__, (kind,), {"forward": forward})


def test_a_body_that_two_calls_share_is_left_alone() -> None:
    body = torch.fx.symbolic_trace(nn.Identity())
    root = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    root.add_module("body", body)
    first = root.graph.get_attr("body")
    assert way_into(root.graph, root.graph) == []
    assert way_into(root.graph, torch.fx.Graph()) is None
    call = root.graph.call_function(checkpoint, (first,))
    assert way_into(root.graph, body.graph) == [(call, body)]
    root.graph.call_function(checkpoint, (first,))
    assert way_into(root.graph, body.graph) is None
