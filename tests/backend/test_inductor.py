"""Inductor behind the backend: its modes, its caches, and what the passes cost beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from passes_toys import Toy, video

import freqopt
from freqopt.backend import freqopt_backend, parse_options
from freqopt.errors import OptionError
from freqopt.kernels import overlap

GRID = (6, 8, 16)


class Seen(Exception):
    """Ends a compilation, once inductor has shown its configuration."""


@pytest.mark.parametrize(
    ("mode", "cudagraphs", "autotune"),
    [
        (None, False, False),
        ("default", False, False),
        ("reduce-overhead", True, False),
        ("max-autotune", True, True),
        ("max-autotune-no-cudagraphs", False, True),
    ],
)
def test_a_mode_reaches_inductor(mode: str | None, cudagraphs: bool, autotune: bool) -> None:
    """Read where inductor compiles, behind the passes and AOTAutograd."""
    from torch._inductor import config

    def look(graph: torch.fx.Graph) -> None:
        found = (config.triton.cudagraphs, config.max_autotune)
        split = sum("split_attention" in str(node.target) for node in graph.nodes)
        raise Seen(f"{found} with {split} split")

    options = {"threshold": 0.0, "min_tokens": 1, "strict": True, "mode": mode}
    compiled = torch.compile(Toy(), backend=freqopt_backend, options=options, dynamic=False)
    caches_off = {"force_disable_caches": True, "post_grad_custom_post_pass": look}
    torch._dynamo.reset()
    # Which error wraps it differs between versions of torch.
    failing = pytest.raises(Exception, match=rf"\({cudagraphs}, {autotune}\) with 2 split")
    with config.patch(caches_off), torch.no_grad(), failing:
        compiled(video(GRID))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="reduce-overheads.*reduce-overhead"):
        parse_options({"mode": "reduce-overheads"})
    assert parse_options({"mode": "fast", "inner": "aot_eager"}).mode == "fast"


@pytest.mark.gpu
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_cuda_graphs_are_replayed_with_changing_content(
    threshold: float, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay reads each call's tensors and routes anew: nothing of the recording stays.

    beside: with the probes' chain on a stream of its own, as in large calls.
    """
    monkeypatch.setattr(overlap, "OVERLAP_ROWS", 1 if beside else 1 << 62)
    model = Toy().cuda().eval()
    options = {"threshold": threshold, "min_tokens": 1, "strict": True}
    run = {
        mode: torch.compile(
            model, backend=freqopt_backend, dynamic=False, options={**options, "mode": mode}
        )
        for mode in (None, "reduce-overhead")
    }
    freqopt.reset_counters()
    outputs = []
    with torch.no_grad():
        for scale in (1.0, 1.0, 0.1, 3.0, 1.0):
            x = scale * video(GRID).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            got = run["reduce-overhead"](x).clone()
            plain = run[None](x)
            torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
            if threshold == 0:
                torch.testing.assert_close(got, model(x), rtol=1e-2, atol=1e-2)
            outputs.append(got)
    assert freqopt.counters().split == 2 * 2 * len(outputs)
    assert not any(torch.allclose(outputs[-1], other) for other in outputs[:-1])
    from torch._inductor.cudagraph_trees import get_container

    tree = get_container(torch.cuda.current_device()).tree_manager
    assert tree is not None and tree.roots, "inductor did not record a CUDA graph"


COMPILED_TWICE = """
import json, sys, time, torch
from passes_toys import Toy, video
from torch._dynamo.utils import counters
import freqopt
from freqopt.backend import freqopt_backend
torch.manual_seed(0)
model, x = Toy(), video((6, 8, 16))
options = {"threshold": float(sys.argv[1]), "min_tokens": 1, "strict": True}
with torch.no_grad():
    out = torch.compile(model, backend=freqopt_backend, options=options, dynamic=False)(x)
    error = float((out - model(x)).norm() / out.norm())
print(json.dumps({
    "aot": dict(counters["aot_autograd"]), "fx": dict(counters["inductor"]), "error": error,
    "split": freqopt.counters().split}))
"""


def in_a_process(threshold: float, cache: Path) -> dict[str, Any]:
    """Compile the toy with inductor in a process of its own; caches lie in `cache`."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_TWICE, str(threshold)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_graphs_can_be_cached() -> None:
    """Names of budgets are in no set: its order, and cache keys with it, differ by process."""
    graphs: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    options = {"threshold": 0.0, "min_tokens": 1, "inner": inner}
    torch._dynamo.reset()
    torch.compile(Toy(), backend=freqopt_backend, options=options, dynamic=False)(video(GRID))
    (gm,) = graphs
    assert len([name for name, _ in gm.named_buffers() if "freqopt_budget" in name]) == 2
    assert not gm._non_persistent_buffers_set
    # AOTAutograd's cache takes no method of what has no example.
    methods = gm.graph.find_nodes(op="call_method", target="flatten")
    assert methods and all("example_value" in node.args[0].meta for node in methods)


@pytest.mark.slow
def test_a_second_process_hits_the_caches(tmp_path: Path) -> None:
    """With another budget too: budgets are operands, so what is cached serves them all."""
    first, *others = (in_a_process(threshold, tmp_path) for threshold in (1e9, 1e9, 1e-9))
    assert first["aot"].get("autograd_cache_hit", 0) == 0
    assert first["aot"]["autograd_cache_miss"] == first["fx"]["fxgraph_cache_miss"] == 1
    for again in others:
        assert again["aot"]["autograd_cache_hit"] == again["fx"]["fxgraph_cache_hit"] == 1
        assert again["aot"].get("autograd_cache_bypass", 0) == 0
        assert again["split"] == 2
    assert others[0]["error"] == pytest.approx(first["error"], rel=1e-3)
    assert others[0]["error"] > 1e-2 and others[1]["error"] < 1e-4
