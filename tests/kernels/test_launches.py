"""The declared launches: they fit their kernels, and PyTorch launches what they say."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from freqopt.exporters.tensorrt.aot.chain import Call, extents_of
from freqopt.kernels import overlap
from freqopt.kernels.forward import attention, probe, routing, split, summaries
from freqopt.kernels.launches import Bound, KernelLaunch, bind
from freqopt.kernels.layout import Inputs, Settings, TokenLayout
from freqopt.kernels.order_launches import CONTENT_ORDER, order_launches
from freqopt.kernels.specialise import NATIVE, POINTERS
from freqopt.kernels.split_launches import LISTED, RANKING, SHAPES, SPLIT, key_ranges, launches_of
from freqopt.kernels.tiles import launch_for

EXPORTED = ("density", "text")
DECLARED = (*SPLIT, *LISTED, *RANKING, *CONTENT_ORDER)


def bound(dim: int = 64) -> dict[str, Bound]:
    ranking = {launch.name: bind(launch, {}) for launch in RANKING}
    return {**launches_of(launch_for(torch.float16, dim), dim), **order_launches(dim), **ranking}


@pytest.mark.parametrize("launch", DECLARED, ids=lambda launch: launch.name)
def test_launch_fits_its_kernel(launch: KernelLaunch) -> None:
    """Every constant is given, and by one side; names are those of arguments."""
    parameters = inspect.signature(launch.kernel.fn).parameters
    constants = {n for n, p in parameters.items() if "constexpr" in str(p.annotation)}
    needed = {n for n in constants if parameters[n].default is inspect.Parameter.empty}
    given = {*launch.constants, *launch.of_call}
    assert needed <= given <= constants
    assert not set(launch.constants) & set(launch.of_call)
    assert set(launch.passed) <= set(parameters) - constants
    values = {launch.passed.get(name, name) for name in parameters}
    assert set(f"{launch.writes} {launch.rewrites}".split()) <= values
    found = bound()[launch.name]
    assert all(isinstance(part, int) and part > 0 for _, part in found.axes)
    assert all(isinstance(option, int) for option in found.options.values())


def test_what_is_read_was_written() -> None:
    """Walked in order: no launch reads a tensor that no earlier one has made."""
    made = {"query", "key", "value", "budget", "order", "key_order", "key_mask"}
    for launch in SPLIT:
        parameters = inspect.signature(launch.kernel.fn).parameters
        names = {
            launch.passed.get(n, n)
            for n, p in parameters.items()
            if (n in NATIVE or n in POINTERS) and p.default is inspect.Parameter.empty
        }
        written = set(launch.writes.split())
        assert names - written <= made, launch.name
        assert set(launch.rewrites.split()) <= made, launch.name
        made |= written
    assert set(SHAPES) == made - {
        *("query", "key", "value", "budget", "order", "key_order", "key_mask", "out")
    }


GRIDS = {
    "summarise": (24, 128),
    "total": (4, 24),
    "centre": (16, 24),
    "first": (16, 24),
    "h_bar": (16, 24),
    "pool_tiles": (24, 256),
    "disperse": (24, 4, 8),
    "score": (24, 32),
    "limits": (24,),
    "density": (24,),
    "route": (256, 24),
    "probe": (11, 24, 1),
    "merge": (16, 24),
    "estimate": (8, 24, 1),
    "fit": (24,),
    "ridge": (24,),
    "attend": (512, 24),
    "text": (4, 24),
}


def test_grids_of_a_large_call() -> None:
    """24 heads of 32,760 tokens and 226 of text, head dim 128 in half precision, on Hopper."""
    extents = extents_of(Call(24, 24, 32_986, 128, 32_760, 0, 0.0, 64))
    extents |= {"pairs": 24, "kv_pairs": 24}
    declared = launches_of(launch_for(torch.bfloat16, 128), 128)
    assert {launch.name: declared[launch.name].grid(**extents) for launch in SPLIT} == GRIDS


class Recorder:
    """Has a kernel's launch syntax and keeps what it is given."""

    def __init__(
        self, kernel: Any, seen: list[tuple[str, tuple[int, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **named: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, given, strict=False)) | named
            self.seen.append((self.kernel.fn.__name__, tuple(grid), arguments))

        return launch


@pytest.mark.parametrize("dim", [40, 64, 256])
def test_a_call_launches_what_is_declared(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 2, 4 heads over 2, text on both sides: kernels, grids, constants, options, memory."""
    seen: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    for module in (attention, probe, routing, summaries):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    monkeypatch.setattr(overlap, "OVERLAP_ROWS", 10**9)
    batch, heads, kv_heads, layout = 2, 4, 2, TokenLayout((5, 7, 9), 3, 5)
    query = torch.zeros(batch, heads, 323, dim, dtype=torch.float16)
    key = query[:, :kv_heads]
    split.split_forward(
        Inputs(query, key, key, torch.ones(heads), None, layout), Settings(0.1, 0.0, 64)
    )
    call = Call(heads, kv_heads, 323, dim, layout.tokens, 3, 0.0, 64)
    extents = {**extents_of(call), "pairs": batch * heads, "kv_pairs": batch * kv_heads}
    extents["parts"] = key_ranges(batch * heads, extents["blocks"])
    launched = {name: (grid, named) for name, grid, named in seen}
    assert len(launched) == len(seen)
    declared = launches_of(split.launch_on("cpu", torch.float16, dim, layout.tokens), dim)
    of_calls = [launch for launch in SPLIT if launch.name not in EXPORTED]
    assert set(launched) == {launch.kernel.fn.__name__ for launch in of_calls}
    for launch in of_calls:
        grid, arguments = launched[launch.kernel.fn.__name__]
        wanted = declared[launch.name]
        assert grid == wanted.grid(**extents), launch.name
        assert {name: arguments[name] for name in wanted.fixed} == wanted.fixed, launch.name
        assert set(launch.of_call) <= set(arguments), launch.name
        for name, value in arguments.items():
            shape = SHAPES.get(launch.passed.get(name, name))
            if shape is not None and isinstance(value, torch.Tensor):
                sizes = (extents[x] if isinstance(x, str) else x for x in shape)
                assert value.numel() == batch * math.prod(sizes), (launch.name, name)
