"""What compiling, inspecting, calibrating and exporting say about the attention of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.calibration.measure.recorder import Desk, Recorder, recording_backend
from freqopt.exporters.program import make_program
from freqopt.passes.find import Grids
from freqopt.passes.naming import module_path
from freqopt.passes.nodes import value

OP = torch.ops.freqopt.split_attention.default


class Said(NamedTuple):
    """What is done about one site: the grid it is split on, or why it stays dense."""

    grid: tuple[int, ...] | None
    why_not: str = ""


class Case(NamedTuple):
    """A model, a call of it, and how many of its attentions can be split."""

    model: nn.Module
    inputs: dict[str, Any]
    split: int


Account = dict[str, Said]


def split_in(gm: fx.GraphModule) -> Account:
    """The sites whose attention the op has taken the place of, and its grid there."""
    found = {}
    for body in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        for node in body.graph.find_nodes(op="call_function", target=OP):
            found[module_path(node) or "model"] = Said(tuple(int(value(e)) for e in node.args[5]))
    return found


def compiled(case: Case, **options: Any) -> Account:
    found: Account = {}

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.update(split_in(gm))
        return gm.forward

    torch._dynamo.reset()
    freqopt.reset_counters()
    options = {"min_tokens": 0, "inner": inner, **options}
    with torch.no_grad():
        torch.compile(case.model, backend=freqopt_backend, options=options, dynamic=False)(
            **case.inputs
        )
    counted = freqopt.counters().sites
    assert {site.site for site in counted if site.split} == set(found)
    return {
        site.site: found[site.site] if site.split else Said(None, site.reason) for site in counted
    }


def inspected(case: Case, **options: Any) -> Account:
    torch._dynamo.reset()
    found = freqopt.inspect(case.model, min_tokens=0, **options, **case.inputs)
    return {
        site.name: Said(site.grid) if site.decision == "split" else Said(None, site.reason)
        for site in found.sites
    }


def recorded(case: Case, monkeypatch: pytest.MonkeyPatch, *grids: Any) -> Account:
    """What calibration records, given a grid or some to try."""
    desk, seen = Desk(), {}
    original = Recorder.__call__

    def call(self: Recorder, *arguments: Any) -> Tensor:
        seen[self.site] = Said(tuple(arguments[4]))
        return original(self, *arguments)

    torch._dynamo.reset()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Recorder, "__call__", call)
        backend = recording_backend(desk, Grids(*grids))
        torch.compile(case.model, backend=backend, dynamic=False)(**case.inputs)
    assert set(seen) == set(desk.result.shapes)
    return {**seen, **{name: Said(None, why) for name, why in desk.dense_sites.items()}}


def exported(case: Case, **options: Any) -> Account:
    program = make_program(case.model, (), case.inputs, **options)
    found = split_in(program.exported.graph_module)
    assert len(found) == len(program.split)
    return {
        **{name: found.get(name, Said(None, "lost")) for name in program.split},
        **{name: Said(None, why) for name, why in program.dense.items()},
    }


def check_agreement(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four say the same, about as many attentions as the case says can be split."""
    found = compiled(case)
    assert sum(said.grid is not None for said in found.values()) == case.split
    assert all(said.grid or said.why_not for said in found.values())
    assert inspected(case) == found
    assert recorded(case, monkeypatch) == found
    assert exported(case) == found
