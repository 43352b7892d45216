"""The Gluon kernel in the library: which calls it serves, its tensor maps, its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ort_programs import Programs, build_driver, build_programs

from freqopt.exporters.onnx.cubins import Compiled, compile_table
from freqopt.exporters.onnx.launch_arguments import launch_arguments, parameter_sizes
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.variant import CAPABILITIES, Variant

SERVED = Variant(90, "bfloat16", 128, False)
HALF, BFLOAT16 = 1, 2
# batch, heads, kv_heads, length, dim, tokens, text_before, density, probes, type, masked
GOOD = (2, 4, 2, 315, 128, 315, 0, 0.0, 64, BFLOAT16, 0)
MAPPED = ("key", "value", "low_key", "low_value", "matrix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hopper")


@pytest.fixture(scope="module")
def table(folder: Path) -> list[Compiled]:
    return compile_table([SERVED], folder)


@pytest.fixture(scope="module")
def programs(folder: Path, table: list[Compiled]) -> Programs:
    return build_programs(table, folder)


def attend_of(lines: list[list[str]]) -> list[str]:
    assert not [line for line in lines if line[0] == "error"], lines
    (found,) = [line for line in lines if line[0] == "launch" and "attend" in line[1]]
    return found


def test_table_has_the_kernel_where_pytorch_uses_it(table: list[Compiled]) -> None:
    (row,) = [row for row in table if row.kernel == "attend_hopper"]
    assert row.warps == 12 and row.grid == "queries/128,pairs/1"
    assert 200_000 < row.shared <= CAPABILITIES[90]
    assert [r.kernel for r in table].count("attend") == 1  # for text, and older drivers


def test_maps_and_arguments_are_those_of_the_pytorch_launch(
    programs: Programs, table: list[Compiled]
) -> None:
    """Expected: what `hopper._descriptor` and the launch in `hopper.attend` would pass."""
    lines = programs.run(*GOOD)
    _, symbol, x, y, z, threads, shared, stream, *values = attend_of(lines)
    (row,) = [row for row in table if row.kernel == "attend_hopper"]
    assert symbol == row.symbol
    assert [int(v) for v in (x, y, z, threads, shared, stream)] == [3, 8, 1, 384, row.shared, 0x77]
    at = {line[1]: int(line[2]) + 0x100000 for line in lines if line[0] == "buffer"}
    at |= {"key": at["key_out"], "value": at["value_out"]}
    kv, pairs, blocks, dim = 4, 8, 5, 128
    whole, means = kv * blocks * 64, kv * blocks
    rows = dict(zip(MAPPED, (whole, whole, means, means, pairs * dim), strict=True))
    maps = [line[1:] for line in lines if line[0] == "map"]
    host_bfloat16, swizzle_128, promote_128 = 9, 3, 2
    assert [[int(v) for v in line] for line in maps] == [
        [at[n], host_bfloat16, dim, rows[n], dim * 2, 64, 64, 1, 1, 0, swizzle_128, promote_128, 0]
        for n in MAPPED
    ]
    expected: dict[str, int] = {
        **{n: at[n] for n in ("key_shift", "mass_term", "coefficients", "exact_list", "counts")},
        "query": 0x1000,
        "order": 0x6000,
        "out": 0x7000,
        "stride_qb": 4 * 315 * dim,
        "stride_qh": 315 * dim,
        "stride_qn": dim,
        "stride_ob": 4 * 315 * dim,
        "stride_oh": 315 * dim,
        "stride_on": dim,
        "stride_mb": 0,
        "key_mask": at["route"],
        "heads": 4,
        "group_size": 2,
        "tokens": 315,
        "tiles": 3,
        "blocks": 5,
        "text": 0,
        "text_before": 0,
        "scale": 0x3E000000,
        "order_row": 0,
        "order_share": 8,
        "queries": 315,
        "query_before": 0,
    }
    for name in (*MAPPED, "text_key", "text_value"):
        n = name.removeprefix("text_")  # as hopper.attend without text
        expected |= {f"{name}.map": at[n], f"{name}.extent0": rows[n], f"{name}.extent1": dim}
        expected |= {f"{name}.stride0": dim, f"{name}.stride1": 1}
    assert dict(zip(row.arguments, map(int, values), strict=False)) == expected
    assert values[len(row.arguments) :] == ["0", "0"]
    assert lines[-1] == ["counts", "1", "0", "0"]
    assert ["shared", symbol, "8", str(row.shared)] in lines


def test_text_is_gathered_into_whole_tiles(programs: Programs, table: list[Compiled]) -> None:
    """3 text tokens before the video and 130 behind it: 256 rows per key head, zeros at the end."""
    before, after, kv, row = 3, 130, 4, 256
    length = before + 315 + after
    given = (*GOOD[:3], length, 128, 315, before, *GOOD[7:])
    lines = programs.run(*given)
    at = {line[1]: int(line[2]) + 0x100000 for line in lines if line[0] == "buffer"}
    expected = []
    for source, target in ((0x2000, at["text_key_rows"]), (0x3000, at["text_value_rows"])):
        pitches = [length * row, 256 * row]
        words = kv * 256 * row // 4
        expected += [["fill", target, 0, words], ["copy", source, target, *pitches, 3 * row, kv]]
        far = source + (before + 315) * row
        expected += [["copy", far, target + 3 * row, *pitches, after * row, kv]]
    moved = [[line[0], *map(int, line[1:])] for line in lines if line[0] in ("fill", "copy")]
    assert moved == expected
    maps = [[int(v) for v in line[1:]] for line in lines if line[0] == "map"]
    assert [m[3] for m in maps if m[0] == at["text_key_rows"]] == [kv * 256]
    (row_of,) = [row for row in table if row.kernel == "attend_hopper"]
    values = dict(zip(row_of.arguments, map(int, attend_of(lines)[8:]), strict=False))
    assert values["text_value.map"] == at["text_value_rows"] and values["text"] == 133
    assert values["text_value.extent0"] == kv * 256 and values["text_before"] == 3
    end = next(int(line[1]) for line in lines if line[0] == "bytes") + 0x100000
    assert at["text_value_rows"] + kv * 256 * row <= end
    assert lines[-1] == ["counts", "1", "0", "0"]


def test_whole_tiles_of_text_need_no_zeros(programs: Programs) -> None:
    lines = programs.run(*GOOD[:3], 315 + 128, *GOOD[4:])
    assert [line[0] for line in lines if line[0] in ("fill", "copy")] == ["copy", "copy"]


def test_a_driver_without_tensor_maps_is_served_and_counted(
    programs: Programs, folder: Path
) -> None:
    old = build_driver(folder / "old.so", "-DWITHOUT_TENSOR_MAPS")
    lines = programs.run(*GOOD, driver=old)
    assert attend_of(lines)[1] == "attend_kernel"
    assert lines[-1] == ["counts", "0", "1", "1"]


def test_a_map_that_cannot_be_made_is_an_error(programs: Programs) -> None:
    lines = programs.run(*GOOD, FAKE_MAP_FAILURE="1")
    assert " ".join(lines[-1]) == "error encoding a tensor map failed: a made-up error (1)"
    assert not [line for line in lines if line[0] == "launch" and "attend" in line[1]]


def variants() -> Iterator[Variant]:
    for dtype in ("float32", "float16", "bfloat16"):
        for dim in (64, 96, 128):
            for capability in CAPABILITIES:
                yield Variant(capability, dtype, dim, False)


def test_the_table_follows_the_rule_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqopt.kernels.specialise import hopper_specialisation

    for v in variants():
        monkeypatch.setattr(hopper, "_is_hopper", lambda _, c=v.capability: c == 90)
        query = torch.empty(1, 1, 1, v.head_dim, dtype=getattr(torch, v.dtype))
        assert (hopper_specialisation(v) is not None) == hopper.applies(query), v


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2,
	.param .f32 kernel_param_3,
	.param .u64 .ptr .global .align 1 kernel_param_4,
	.param .u64 kernel_param_5
)
.reqntid 384
{ ld.param.b64 %rd1, [kernel_param_0]; }
"""


def test_parameter_sizes() -> None:
    assert parameter_sizes(PTX) == [8, 128, 4, 4, 8, 8]


def test_another_layout_of_arguments_is_refused() -> None:
    """A Triton that drops the extents behind a map, or asks for another swizzle."""
    function = SimpleNamespace(arg_names=["query", "key", "tokens"], is_gluon=lambda: True)
    given: Any = SimpleNamespace(name="attend", function=function, constants={})
    made = SimpleNamespace(asm={"ptx": PTX}, metadata=SimpleNamespace(tensordesc_meta=[]))
    with pytest.raises(RuntimeError, match="compiled attend to parameters of"):
        launch_arguments(given, made)
    parts = ".param .u32 a,\n\t.param .u32 b,\n\t.param .u64 c,\n\t.param .u64 d,\n\t.param .u32 n,"
    made.asm["ptx"] = PTX.replace(
        ".param .u32 kernel_param_2,\n\t.param .f32 kernel_param_3,", parts
    )
    right = {"swizzle": 3, "elem_size": 2, "block_size": [64, 64], "fp4_padded": False}
    made.metadata.tensordesc_meta = [right]
    assert launch_arguments(given, made) == (
        "query",
        "key.map",
        "key.extent0",
        "key.extent1",
        "key.stride0",
        "key.stride1",
        "tokens",
    )
    made.metadata.tensordesc_meta = [{**right, "swizzle": 2}]
    with pytest.raises(RuntimeError, match="and swizzle 3"):
        launch_arguments(given, made)
