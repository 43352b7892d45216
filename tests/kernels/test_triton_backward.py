"""Runs triton_backward_checks.py: on the GPU, or in Triton's interpreter in another process.

Why another process: see test_triton.py. Its kernels compile without a GPU, too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import forks

pytest.importorskip("triton")
CHECKS = Path(__file__).parents[1] / "support" / "triton_backward_checks.py"

SHARED = {80: 163 * 1024, 90: 227 * 1024}

KERNELS = {
    "list_kernel",
    "rows_kernel",
    "sum_kernel",
    "band_gradient_kernel",
    "mean_gradient_kernel",
    "h_bar_gradient_kernel",
    "query_gradient_kernel",
    "key_gradient_kernel",
    "finish_kernel",
}

SCRIPT = """
import json, sys
import torch
from compile_only import CompileOnly
from without_code import only_memory
from freqopt.kernels.backward import launch
from freqopt.kernels.backward import parts
from freqopt.kernels.forward import summaries
from freqopt.kernels.layout import Inputs, TokenLayout
dtype, dim, capability = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:4])
found, forward = {}, {}
for module in (launch, parts, summaries):
    for name in [n for n in dir(module) if n.endswith("_kernel")]:
        kept = forward if module is summaries else found
        setattr(module, name, CompileOnly(getattr(module, name), capability, kept))
q = torch.zeros(1, 2, 330, dim, dtype=dtype)
route = torch.zeros(1, 2, 3, 5, dtype=torch.int8)
inputs = Inputs(q, q, q, torch.ones(2), None, TokenLayout((5, 7, 9), 7, 8))
forward_found = launch.Forward(q, route, torch.ones(1, 2, 2), q.new_ones(1, 2, dim, dim))
with only_memory(sys.argv[4:] == ["memory"]):
    launch.split_backward(q, torch.ones(1, 2, 330), inputs, forward_found, 0.1)
print(json.dumps({n: k.metadata.shared for n, k in found.items()}))
"""

if torch.cuda.is_available():
    from triton_backward_checks import *  # noqa: F403
else:
    from triton_backward_checks import (  # noqa: F401
        test_a_graph_of_forward_and_backward_replays_with_other_content,
        test_gradients_of_every_head_dim_on_the_gpu,
    )

    def test_in_the_interpreter() -> None:
        options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
        done = forks(interpret=True).run("-m", "pytest", *options, CHECKS, "-m", "not gpu")
        assert done.returncode == 0, done.stdout[-4000:]
        assert "18 passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "code"),
    [
        ("bfloat16", 128, 90, True),
        ("float32", 256, 80, False),  # whose code takes most of a minute
        pytest.param("float32", 256, 80, True, marks=pytest.mark.slow),
        pytest.param("bfloat16", 256, 80, True, marks=pytest.mark.slow),  # needs less than float32
    ],
)
def test_backward_kernels_fit_shared_memory(
    dtype: str, dim: int, capability: int, code: bool, tmp_path: Path
) -> None:
    script = tmp_path / "compile_kernels.py"
    script.write_text(SCRIPT)
    done = forks(interpret=False).run(script, dtype, dim, capability, "code" if code else "memory")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert set(found) == KERNELS
    assert all(shared <= SHARED[capability] for shared in found.values()), found
