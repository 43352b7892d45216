"""The low-precision experiment: its kernels compile, its emulation and its arithmetic hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import low_precision, low_precision_error
from freqopt.kernels.op import split_attention

pytest.importorskip("triton")

COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from benchmarks.low_precision_kernel import KEYS8, VALUES8, attend8_kernel
from freqopt.kernels.gluon_attend import OPERAND
from freqopt.kernels.specialise import DESCRIPTORS, NATIVE, POINTERS
words = ("s32.s8.s8", "f32.e4m3.e4m3", "f32.bf16.bf16")
found = []
for with_values in (False, True):
    constants = {"D": 128, "WITH_VALUES": with_values, "STAGES": 3}
    special = {"key": f"tensordesc<i8[64, 128],{KEYS8.value!r}>"}
    if with_values:
        special["value"] = f"tensordesc<fp8e4nv[128, 64],{VALUES8.value!r}>"
    signature, attributes = {}, {}
    for i, name in enumerate(attend8_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in special:
            signature[name] = special[name]
        elif name in DESCRIPTORS:
            signature[name] = f"tensordesc<bf16[64, 64],{OPERAND.value!r}>"
        elif name in NATIVE or name in POINTERS:
            signature[name] = POINTERS.get(name, "*bf16")
        elif name in ("key_step", "value_step", "value_shift"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if "*" in signature[name] or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        GluonASTSource(attend8_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": 4},
    )
    found.append({"shared": made.metadata.shared, **{w: made.asm["ptx"].count(w) for w in words}})
print(json.dumps(found))
"""


def test_kernels_compile_to_products_in_8_bits() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    keys, both = json.loads(done.stdout.splitlines()[-1])
    assert max(keys["shared"], both["shared"]) <= 232_448
    # Two consumers; scores of the first step and of the loop in four products of 32 channels.
    assert keys["s32.s8.s8"] == both["s32.s8.s8"] == 2 * 2 * 4
    # Values of the loop and of the last step: four products of 32 keys, or eight of 16.
    assert (keys["f32.e4m3.e4m3"], both["f32.e4m3.e4m3"]) == (0, 2 * 2 * 4)
    # Low band: scores twice, H-bar, values twice, in eight products each.
    assert (keys["f32.bf16.bf16"], both["f32.bf16.bf16"]) == (2 * 7 * 8, 2 * 5 * 8)


def test_emulation_without_rounding_is_the_split() -> None:
    grid = (3, 6, 10)
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(1, 2, 180, 16, generator=generator) for _ in range(3))
    heads = low_precision_error.route_heads(tensors, grid, 0.7)
    found = low_precision_error.head_errors(heads[0], 1)
    assert found["bf16"][2:] == [0.0, 0.0]
    # The op at the threshold that the emulation chose, in bfloat16 as it routes.
    query, key, value = (x.bfloat16() for x in tensors)
    exact = torch.nn.functional.scaled_dot_product_attention(*tensors)
    density = float((heads[0].route == 2).float().mean() + (heads[1].route == 2).float().mean()) / 2
    out = split_attention(query, key, value, grid=grid, density=density, probes=64)
    off = (out.float() - exact)[0, 0]
    op_error = float(off.norm() / exact[0, 0].norm())
    assert found["bf16"][1] == pytest.approx(op_error, rel=0.25)


def test_noise_of_the_roundings_is_ordered_as_their_digits_are() -> None:
    grid = (3, 8, 16)
    generator = torch.Generator().manual_seed(1)
    # Keys far from the origin and alike within a block: what a mean takes away.
    tensors = [torch.randn(1, 2, 384, 64, generator=generator) for _ in range(3)]
    tensors[1] = tensors[1] + 3 * torch.randn(1, 2, 1, 64, generator=generator)
    rows = low_precision_error.measure(tuple(tensors), grid, 0.6, 1)["rows"]
    noise = {row["choice"]: row["noise_l2"] for row in rows}
    assert 0 < noise["keys int8, head's mean"] < 0.5 * noise["keys e4m3, head's mean"]
    assert noise["keys int8, head's mean, step per block"] < noise["keys int8, head's mean"]
    both = noise["keys int8 + values e4m3, head's mean"]
    assert both == pytest.approx(
        (noise["keys int8, head's mean"] ** 2 + noise["values e4m3, head's mean"] ** 2) ** 0.5,
        rel=0.2,
    )


def test_a_rounding_has_its_types_error() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    for kind, least, most in (("int8", 0.005, 0.012), ("e4m3", 0.02, 0.03)):
        off = low_precision_error.rounded(x, kind, (0, 1)) - x
        assert least < float(off.norm() / x.norm()) < most


def test_equal_error_gives_density_back() -> None:
    def error(density: float) -> float:
        return 0.02 * density**-0.5

    def row(density: float) -> dict[str, object]:
        plain = {"l1": error(density), "l2": 2 * error(density), "ms": 1 + 20 * density}
        # Ten per cent faster, with an error that bfloat16 has at nine tenths of the density.
        low = {"l1": error(0.9 * density), "l2": plain["l2"], "ms": 0.9 * (1 + 20 * density)}
        return {"density": density, "bf16": plain, "int8": low, "int8 + e4m3": low}

    measured = {
        "rest_ms": 0.5, "quantise_ms": {"int8": 0.1, "int8 + e4m3": 0.2},
        "rows": [row(d) for d in (0.2, 0.05, 0.1)],
    }  # fmt: skip
    found = low_precision.compare(measured)
    chosen = next(g for g in found if g["density"] == 0.1 and g["kernel"] == "int8")
    assert chosen["bf16_density_l1"] == pytest.approx(0.09)
    assert chosen["bf16_density_l2"] == pytest.approx(0.1)
    assert chosen["gain_same"] == pytest.approx(1 - (0.5 + 0.1 + 2.7) / 3.5)
    assert chosen["gain_l2"] == pytest.approx(chosen["gain_same"])
    assert chosen["gain_l1"] == pytest.approx(1 - 3.3 / 3.3, abs=1e-9)
    # Past the last point the last segment goes on.
    assert low_precision.density_at([(0.1, 0.2), (0.2, 0.1)], 0.05) == pytest.approx(0.4)
    assert low_precision.density_at([(0.1, 0.2), (0.2, 0.1)], 0.4) == pytest.approx(0.05)


def test_docs_hold_the_result_files_table() -> None:
    assert low_precision.rewrite_docs(check=True)
