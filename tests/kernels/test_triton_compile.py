"""Every kernel compiles for real GPUs without one, and its shared memory stays in bounds.

Runs in its own process because the other tests switch Triton to its interpreter at import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forks

from freqopt.kernels.op import WIDE_SHARED

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import torch
from compile_only import CompileOnly
from freqopt.kernels import overlap
from freqopt.kernels.forward import attention, density, order, probe, routing, split, summaries
from freqopt.kernels.layout import Inputs, Settings, TokenLayout
dtype, dim, capability = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:4])
found = {}
overlap.OVERLAP_ROWS = 1 if sys.argv[4] == "beside" else 10**9
for module in (attention, density, order, probe, routing, summaries):
    for name in [n for n in dir(module) if n.endswith("_kernel")]:
        setattr(module, name, CompileOnly(getattr(module, name), capability, found))
q = torch.zeros(1, 330, 2, dim, dtype=dtype).transpose(1, 2)
layout, chunks = TokenLayout((5, 7, 9), 7, 8), torch.full((2,), 512, dtype=torch.int32)
inputs = Inputs(q, q, q, torch.ones(2), None, layout)
split.split_forward(inputs, Settings(0.1, 0.0, 64))
if sys.argv[4] == "beside":
    queries = TokenLayout((1, 1, 200), 0, 0)
    other = Inputs(q[:, :, :200], q, q, torch.ones(2), None, layout, queries, chunks)
    split.split_forward(other, Settings(0.1, 0.2, 64, 512, True))
print(json.dumps({n: [k.metadata.shared, len(k.asm["cubin"])] for n, k in found.items()}))
"""

SHORT_CALL = {
    f"{name}_kernel"
    for name in (
        "attend centre disperse estimate first_order fit h_bar limits merge pool_tiles probe ridge "
        "route score summarise total"
    ).split()
}
BY_CONTENT = {f"{name}_kernel" for name in "directions halve leaf moments project".split()}
OF_A_DENSITY = {"histogram_kernel", "narrow_kernel"}

HOPPER_SCRIPT = """
import json, sys
from freqopt.kernels import specialise
from freqopt.kernels.specialise import compile_specialised
from freqopt.kernels.variant import Variant
variant = Variant(90, sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))
of_hopper = getattr(specialise, "hopper_" + (sys.argv[5:] or ["specialisation"])[0])
given = of_hopper(variant, long=bool(int(sys.argv[4])))
made = compile_specialised(given, variant)
found = {"shared": made.metadata.shared, "warps": made.metadata.num_warps}
words = "wgmma.mma_async cp.async.bulk.tensor setmaxnreg cp.async.cg st.local".split()
for word in words:
    found[word] = made.asm["ptx"].count(word)
print(json.dumps(found))
"""

SCORE_SCRIPT = """
import json, sys
from freqopt.kernels.specialise import compile_specialised, hopper_scores
from freqopt.kernels.variant import Variant
variant = Variant(90, sys.argv[1], int(sys.argv[2]), False)
made = compile_specialised(hopper_scores(variant), variant)
found = {"shared": made.metadata.shared}
for word in "wgmma.mma_async cp.async.bulk.tensor shfl.sync.bfly".split():
    found[word] = made.asm["ptx"].count(word)
print(json.dumps(found))
"""


WIDE_SCRIPT = """
import json, sys
from freqopt.kernels.specialise import compile_specialised, specialisations
from freqopt.kernels.variant import Variant
from without_code import shared_by
variant = Variant(int(sys.argv[1]), sys.argv[2], 256, True)
# The text kernel is onnxruntime's alone.
kernels = [g for g in specialisations(variant) if g.name != "text"]
if sys.argv[3:]:
    made = {g.name: compile_specialised(g, variant) for g in kernels}
    print(json.dumps({n: [k.metadata.shared, len(k.asm["cubin"])] for n, k in made.items()}))
else:
    print(json.dumps({g.name: shared_by(g, variant) for g in kernels}))
"""

WIDE = [(86, "bfloat16"), (90, "float32")]


def run(folder: Path, text: str, *arguments: str) -> dict[str, Any]:
    script = folder / "compile_kernels.py"
    script.write_text(text)
    done = forks(interpret=False).run(script, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("capability", "dtype"), WIDE)
def test_wide_heads_need_what_the_op_says(capability: int, dtype: str, tmp_path: Path) -> None:
    needed = run(tmp_path, WIDE_SCRIPT, str(capability), dtype)
    said = WIDE_SHARED[getattr(torch, dtype).itemsize]
    if capability < 90:  # tiles for the smallest chip that the op accepts
        assert max(needed.values()) == said
    assert needed["probe"] == said  # which no tile choice makes smaller


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), WIDE)
def test_wide_heads_compile_and_need_the_same(capability: int, dtype: str, tmp_path: Path) -> None:
    needed = run(tmp_path, WIDE_SCRIPT, str(capability), dtype)
    whole = run(tmp_path, WIDE_SCRIPT, str(capability), dtype, "whole")
    assert {name: shared for name, (shared, _) in whole.items()} == needed
    assert all(size > 1000 for _, size in whole.values())


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim", "masked"), [("bfloat16", 128, 0), ("float16", 128, 1), ("bfloat16", 64, 1)]
)
def test_hopper_kernel_compiles_to_what_it_is_written_for(
    dtype: str, dim: int, masked: int, long: bool, tmp_path: Path
) -> None:
    found = run(tmp_path, HOPPER_SCRIPT, dtype, str(dim), str(masked), str(int(long)))
    assert found["shared"] <= 232_448
    assert found["warps"] == 12  # two consumers and a producer, each a group of four
    # Per consumer five times scores and H-bar, 16 channels at a time; five times values, 16 keys.
    assert found["wgmma.mma_async"] == 2 * (6 * dim // 16 + 5 * 8)
    # Two copies of 64 rows by 64 channels for each of: H-bar, and keys and values of three loops;
    # a long sequence's third loop gathers, and 128 threads copy a piece's rows in four rounds.
    assert found["cp.async.bulk.tensor"] >= 2 * dim // 64 * (5 if long else 7)
    assert found["cp.async.cg"] >= 4 * 2 * dim // 64 * 4 if long else found["cp.async.cg"] == 0
    assert found["setmaxnreg"] > 0


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 128), ("float16", 64)])
def test_hopper_preparation_compiles_to_what_it_is_written_for(
    dtype: str, dim: int, long: bool, tmp_path: Path
) -> None:
    found = run(tmp_path, HOPPER_SCRIPT, dtype, str(dim), "0", str(int(long)), "preparation")
    assert found["shared"] <= 232_448
    assert found["warps"] == 12  # values, keys and a producer, each a group of four
    # 64 channels of values by all of keys, 16 tokens at a time.
    assert found["wgmma.mma_async"] == dim // 64 * 4
    # 128 threads copy 64 rows of keys and of values, 16 bytes each.
    assert found["cp.async.cg"] == 2 * dim // 16
    # Both leave in boxes of 64 channels; keys and values pass no register on their way.
    assert found["cp.async.bulk.tensor"] == (0 if long else 2 * dim // 64)
    assert found["setmaxnreg"] > 0 and found["st.local"] == 0


@pytest.mark.parametrize(
    ("dtype", "dim"), [("bfloat16", 128), pytest.param("float16", 64, marks=pytest.mark.smoke)]
)
def test_hopper_scores_compile_to_what_they_are_written_for(
    dtype: str, dim: int, tmp_path: Path
) -> None:
    found = run(tmp_path, SCORE_SCRIPT, dtype, str(dim))
    assert found["shared"] <= 232_448 // 3 - 1024  # three programs of a multiprocessor
    # Two times 64 rows by 64 blocks in the first pass, 64 blocks by 128 rows in the second.
    assert found["wgmma.mma_async"] == 3 * dim // 16
    # A step's keys for the first step, and in both loops.
    assert found["cp.async.bulk.tensor"] == 3 * dim // 64
    # Lanes meet between the passes only: peaks and totals of four rows, two exchanges each.
    assert found["shfl.sync.bfly"] == 2 * 4 * 2


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "shared_limit"),
    [
        ("float16", 64, 80, 166_912),
        ("bfloat16", 96, 90, 232_448),
        # Other tests compile what exports launch of these: each takes half a minute.
        pytest.param("float16", 64, 90, 232_448, marks=pytest.mark.slow),
        pytest.param("bfloat16", 128, 90, 232_448, marks=pytest.mark.slow),
        pytest.param("bfloat16", 256, 90, 232_448, marks=pytest.mark.slow),
        pytest.param("float32", 64, 90, 232_448, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_fit(
    dtype: str, dim: int, capability: int, shared_limit: int, tmp_path: Path
) -> None:
    beside = dim in (64, 256)  # the probes' chain as large calls launch it
    found = run(tmp_path, SCRIPT, dtype, str(dim), str(capability), "beside" if beside else "")
    more = {"probe_tiles_kernel"} | BY_CONTENT | OF_A_DENSITY if beside else set()
    assert set(found) == SHORT_CALL | more
    for name, (shared, size) in found.items():
        assert 0 <= shared <= shared_limit, f"{name} needs {shared} bytes of shared memory"
        assert size > 1000, f"{name} has no code"
