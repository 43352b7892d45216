"""The GPU side of the library without a GPU: kernels compile, and launches are what they should be.

A made-up driver records every launch. What only a GPU can show is marked gpu.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("onnx")

from forks import SUPPORT, forks
from ort_programs import Programs, build_driver, build_programs

from freqopt.exporters.onnx.cubins import Compiled, compile_table, write_sources
from freqopt.exporters.onnx.library import build_library
from freqopt.exporters.problems import ExportError, NotAvailableError
from freqopt.kernels.specialise import NATIVE, POINTERS
from freqopt.kernels.variant import CAPABILITIES, Variant

HOPPER = Variant(90, "float16", 64, True)
AMPERE = Variant(80, "float16", 64, False, content=True)
HOPPERS = {"attend_hopper_kernel"}
PLAIN = {"text_key": 0x2000, "text_value": 0x3000, "query": 0x1000, "order": 0x6000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def table(folder: Path) -> list[Compiled]:
    return compile_table([HOPPER, AMPERE], folder)


@pytest.fixture(scope="module")
def programs(folder: Path, table: list[Compiled]) -> Programs:
    return build_programs(table, folder)


def test_every_kernel_compiles_within_the_chip(table: list[Compiled]) -> None:
    for variant, count in ((HOPPER, 19), (AMPERE, 18 + 16)):
        rows = {row.kernel: row for row in table if row.variant == variant}
        assert len(rows) == count
        assert all(0 <= row.shared <= CAPABILITIES[variant.capability] for row in rows.values())


def test_launches(programs: Programs, table: list[Compiled], folder: Path) -> None:
    """Batch 2, 4 heads over 2 key heads, 5 x 7 x 9 tokens after 3 text tokens, 2 behind.

    On a driver without tensor maps, where the portable kernel attends.
    """
    old = build_driver(folder / "old.so", "-DWITHOUT_TENSOR_MAPS")
    batch, heads, kv_heads, length, dim, tokens, before = 2, 4, 2, 320, 64, 315, 3
    call = (batch, heads, kv_heads, length, dim, tokens, before, 0.0, 64, 1, 1)
    lines = programs.run(*call, driver=old)
    assert not [line for line in lines if line[0] == "error"], lines
    rows = {row.symbol: row for row in table if row.variant == HOPPER}
    buffers = {line[1]: int(line[2]) + 0x100000 for line in lines if line[0] == "buffer"}
    blocks, tiles, pairs, kv = 5, 3, 8, 4
    expected_grid = {
        "limits": (pairs, 1, 1),
        "summarise": (kv, 2, 1),
        "total": (2, kv, 1),
        "centre": (1, kv, 1),
        "first": (1, kv, 1),
        "h_bar": (4, kv, 1),
        "pool_tiles": (pairs, tiles, 1),
        "disperse": (pairs, 1, 1),
        "score": (pairs, 1, 1),
        "route": (tiles, pairs, 1),
        "probe": (5, pairs, 1),
        "merge": (16, pairs, 1),
        "estimate": (1, pairs, 1),
        "fit": (pairs, 1, 1),
        "ridge": (pairs, 1, 1),
        "attend": (3, pairs, 1),
        "text": (1, pairs, 1),
    }
    integers = {
        "heads": heads,
        "group_size": 2,
        "tokens": tokens,
        "tiles": tiles,
        "blocks": blocks,
        "groups": 2,
        "text": 5,
        "text_before": before,
        "probes": 64,
        "parts": 5,
        "cells": dim * dim,
        "stride_qn": dim,
        "stride_kn": dim,
        "stride_vn": dim,
        "stride_on": dim,
        "stride_qh": length * dim,
        "stride_kh": length * dim,
        "stride_vh": length * dim,
        "stride_oh": length * dim,
        "stride_qb": heads * length * dim,
        "stride_ob": heads * length * dim,
        "stride_kb": kv_heads * length * dim,
        "stride_vb": kv_heads * length * dim,
        "stride_mb": length,
        "order_row": 0,
        "order_share": pairs,
        "queries": tokens,
        "query_text": 5,
        "query_before": before,
    }
    seen = []
    for _, symbol, x, y, z, threads, shared, stream, *values in [
        line for line in lines if line[0] == "launch"
    ]:
        row = rows[symbol]
        seen.append(row.kernel)
        assert (int(x), int(y), int(z)) == expected_grid[row.kernel], row.kernel
        assert (int(threads), int(shared), int(stream)) == (row.warps * 32, row.shared, 0x77)
        assert values[-2:] == ["0", "0"]
        for name, text in zip(row.arguments, values, strict=False):
            value, where = int(text), (row.kernel, name)
            if name == "scale":
                assert value == 0x3E000000, where
            elif name in POINTERS or name in NATIVE:
                assert value in {*buffers.values(), *range(0x1000, 0x8000, 0x1000)}, where
                assert value == PLAIN.get(name, value), where
                if name in ("key", "value"):
                    raw = {"key": 0x2000, "value": 0x3000}[name]
                    summarised = row.kernel == "summarise"
                    assert value == (raw if summarised else buffers[f"{name}_out"]), where
                elif name in buffers and row.kernel != "h_bar":
                    assert value == buffers[name], where
            elif row.kernel == "h_bar" and name == "groups":
                assert value == 1
            elif row.kernel == "summarise" and name == "heads":
                assert value == kv_heads
            else:
                assert value == integers[name], where
    before = ["summarise", "total", "centre", "first", "h_bar"]
    scores = ["pool_tiles", "disperse", "score"]
    after = ["limits", "route", "probe", "merge", "estimate", "fit", "ridge", "attend", "text"]
    assert seen == before + scores + after
    raised = {line[1] for line in lines if line[0] == "shared"}
    assert raised == {row.symbol for row in rows.values() if row.shared > 48 * 1024} - HOPPERS


def test_workspace_holds_what_is_written(programs: Programs) -> None:
    lines = programs.run(2, 4, 2, 320, 64, 315, 3, 0.0, 64, 1, 1)
    offsets = sorted((int(line[2]), line[1]) for line in lines if line[0] == "buffer")
    end = next(int(line[1]) for line in lines if line[0] == "bytes")
    room = {
        name: following - at
        for (at, name), (following, _) in zip(offsets, [*offsets[1:], (end, "")], strict=True)
    }
    kv, pairs, blocks, tiles, dim, half = 4, 8, 5, 3, 64, 2
    needed = {
        "key_out": kv * blocks * 64 * dim * half,
        "first_order": kv * dim * dim * 4,
        "limits": pairs * 4,
        "sub_mean": pairs * 64 * dim * half,
        "tile_square": pairs * tiles * dim * half,
        "score": pairs * tiles * blocks * 4,
        "exact_list": pairs * tiles * blocks * 4,
        "exact_out": pairs * 5 * 64 * dim * 4,
        "mass": pairs * 5 * 64 * 2 * 4,
        "counts": pairs * tiles * 4,
        "moments": pairs * 4 * 1 * 16 * 4,
        "coefficients": pairs * 2 * 4,
        "matrix": pairs * dim * dim * half,
        "probe_energy": pairs * 4,
        "probe_error": pairs * 4,
        "logit": pairs * 64 * 5 * 4,
        "term": pairs * 64 * 5 * 2,
        "sums": kv * 2 * 3 * dim * 4,
        "key_shift": kv * dim * 4,
        "route": pairs * tiles * blocks,
    }
    for name, size in needed.items():
        assert size <= room[name] < size + 256, name


# Which rows the launches of an order take: those of halve_<tokens> are one kernel.
ORDERED = ["moments", "directions", "project"]


def launched(programs: Programs, *arguments: float | str) -> list[tuple[str, list[int]]]:
    """Kernels by the names of the table, with their grids and raw arguments."""
    lines = programs.run(*arguments, capability=80, FAKE_IMAGES="1")
    assert not [line for line in lines if line[0] == "error"], lines
    names = {line[1]: line[2] for line in lines if line[0] == "cubin"}
    images = [names[line[1]] for line in lines if line[0] == "image"]
    launches = [line for line in lines if line[0] == "launch"]
    return [
        (name, [int(word) for word in (*line[2:5], *line[8:])])
        for name, line in zip(images, launches, strict=True)
    ]


def test_launches_of_an_order(programs: Programs, table: list[Compiled]) -> None:
    """Batch 2, 4 heads of 2 chunks, 30,000 of 30,010 tokens after 3 of text, all together."""
    found = launched(programs, "order", 2, 4, 30_010, 64, 30_000, 3, 2, 1 << 30, 1)
    far = ["segment", "rank_tokens", "divide"] * 2
    near = [f"halve_{2**i}" for i in range(13, 6, -1)]
    assert [name for name, _ in found] == [*ORDERED, *far, *near, "leaf"]
    rows = {row.kernel: row for row in table if row.variant == AMPERE}
    pairs, seen = 8, []
    for name, (x, y, z, *values) in found:
        given = dict(zip(rows[name].arguments, values, strict=False))
        assert (z, given["heads"]) == (1, 4)
        assert given.get("share", 2) == 2 and given.get("tokens", 30_000) == 30_000
        seen.append((x, y))
        if name in ORDERED:
            assert given["tokens_of"] == 0x2000 and given["text_before"] == 3
            strides = [given[f"stride_{axis}"] for axis in "bhn"]
            assert strides == [4 * 30_010 * 64, 30_010 * 64, 64]
        if name == "moments":
            assert (given["step"], given["samples"], given["span"]) == (59, 509, 128)
    far_grids = [(pairs, 1), (pairs, 235), (pairs, 1), (pairs, 2), (pairs, 235), (pairs, 2)]
    near_grids = [(pairs, -(-30_000 // 2**i)) for i in range(13, 6, -1)]
    assert seen == [(4, pairs), (pairs, 1), (pairs, 235), *far_grids, *near_grids, (pairs, 469)]
    given = [dict(zip(rows[n].arguments, v[3:], strict=False)) for n, v in found]
    # Positions go back and forth between two buffers, and end where they began.
    moved = [
        (g["position"], g["target"])
        for g, (n, _) in zip(given, found, strict=True)
        if n == "divide"
    ]
    assert moved[0] == moved[1][::-1] and given[-1]["position"] == moved[0][0]
    assert (given[-1]["order"], given[-1]["base"], given[-1]["chunks"]) == (0xA000, 0x6000, 0x9000)
    sizes = [g["size"] for g in given if "size" in g]
    assert sizes == [32_768] * 3 + [16_384] * 3 and given[3]["step"] == 16


def test_an_order_in_chunks_begins_with_them(programs: Programs) -> None:
    found = launched(programs, "order", 1, 2, 5000, 64, 5000, 0, 2, 512, 1)
    assert [name for name, _ in found] == [*ORDERED, "halve_512", "halve_256", "halve_128", "leaf"]
    few = launched(programs, "order", 1, 2, 40, 64, 40, 0, 2, 512, 1)
    assert [name for name, _ in few] == [*ORDERED, "leaf"]


def test_launches_replayed_in_the_interpreter_are_the_definition(programs: Programs) -> None:
    """What the C++ launches, run: orders, splits by them, and queries of other tokens."""
    given = json.dumps(vars(programs), default=str)
    done = forks(interpret=True).run(SUPPORT / "ort_replay.py", given=given)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4
    for each in found:
        assert each["permutation"] and each["spread"] < 1.01, each
        assert each["route"] and each["out"] < 5e-3, each
        assert each.get("exact", 0.0) < 5e-3, each
    assert sum("exact" in each for each in found) == 2


def test_without_probes_the_coefficients_are_one(programs: Programs) -> None:
    lines = programs.run(1, 2, 2, 315, 64, 315, 0, 0.0, 0, 1, 0, capability=86)
    assert [line[2:] for line in lines if line[0] == "fill"] == [[str(0x3F800000), "4"]]
    names = [line[1] for line in lines if line[0] == "launch"]
    assert "fit_kernel" not in names and "text_kernel" not in names
    # It makes the first-order matrix of H-bar and those ones.
    assert names[-2:] == ["ridge_kernel", "attend_kernel"]


def test_a_density_is_resolved_on_the_gpu(programs: Programs, table: list[Compiled]) -> None:
    """0.2 of 3 tiles x 5 blocks: three pairs of each head, though 0.2f is more than 0.2."""
    lines = programs.run(1, 2, 2, 315, 64, 315, 0, 0.2, 64, 1, 0, capability=80)
    (values,) = [line[8:] for line in lines if line[:2] == ["launch", "density_kernel"]]
    (row,) = [r for r in table if r.kernel == "density" and r.variant == AMPERE]
    given = dict(zip(row.arguments, map(int, values), strict=False))
    assert given["kept"] == 3 and (given["tiles"], given["blocks"]) == (3, 5)
    at = {line[1]: int(line[2]) + 0x100000 for line in lines if line[0] == "buffer"}
    assert (given["score"], given["limits"]) == (at["score"], at["limits"])
    names = [line[1] for line in lines if line[0] == "launch"]
    assert "limits_kernel" not in names
    order = ["score_kernel", "density_kernel", "route_kernel"]
    assert [name for name in names if name in order] == order


def test_failures_have_messages(programs: Programs) -> None:
    good = (1, 2, 2, 315, 64, 315, 0, 0.0, 64, 1, 0)

    def message(arguments: tuple[float, ...], **more: str) -> str:
        capability = int(more.pop("capability", "80"))
        lines = programs.run(*arguments, capability=capability, **more)
        return " ".join(lines[-1])

    assert message(good) == "counts 0 1 0"
    assert "no attend kernel for sm_90, float16, head_dim 64" in message(good, capability="90")
    assert "bfloat16" in message((*good[:-2], 2, 0))
    assert "head_dim 72" in message((*good[:4], 72, *good[5:]))
    assert "a made-up error (209)" in message(good, FAKE_FAILURE="1")
    assert "driver cannot be opened" in message(good, FREQOPT_LIBCUDA="/nowhere.so")


SESSION = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
import torch
from attention_cases import Case, make_tensors
from onnx_cases import feed, order_model, session, split_model

case = Case((5, 7, 9), dim=64, heads=4, kv_heads=2, before=3, after=2)
tensors, budget = make_tensors(case), torch.full((4,), 0.5)
attributes = {"scale": 0.125, "density": 0.0, "probes": 64}
halves = [x.half() for x in tensors[:3]]
good = feed(case, (*halves, None), budget)
runner = session(split_model(20, torch.float16, **attributes), sys.argv[1])
runner.run(None, good)
single = session(split_model(20, torch.float32, **attributes), sys.argv[1])
for name, bad in (
    ("", None), ("text_before", np.array([6])), ("budget", np.zeros(3, np.float32)),
    ("key", np.zeros((2, 2, 7, 64), np.float16)), ("key_mask", np.ones((1, 7), np.bool_)),
):
    try:
        if name:
            runner.run(None, {**good, name: bad})
        else:
            single.run(None, feed(case, (*tensors[:3], None), budget))
    except Exception as error:
        print("refused", error)
orders = session(order_model(20, torch.float16, largest_chunk=256), sys.argv[1])
tokens = {"tokens": good["key"], "base": np.arange(315), "text_before": np.array([3])}
(made,) = orders.run(None, {**tokens, "chunks": np.array([256, 0], np.int32)})
print("shape", made.shape)
for chunks, before in (([256, 0, 0], 3), ([256], 6)):
    given = {**tokens, "chunks": np.array(chunks, np.int32), "text_before": np.array([before])}
    try:
        orders.run(None, given)
    except Exception as error:
        print("refused", error)
"""


def test_onnxruntime_launches_what_it_is_given_and_is_told_of_what_does_not_fit(
    programs: Programs, folder: Path, table: list[Compiled], tmp_path: Path
) -> None:
    """The operator on the CPU provider, whose memory the made-up driver is given."""
    pytest.importorskip("onnxruntime")
    provider = 'FREQOPT_PROVIDER="CPUExecutionProvider"'
    library = build_library(tmp_path, write_sources(table, folder), defines=(provider,))
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(library), str(Path(__file__).parents[1] / "support")],
        capture_output=True,
        text=True,
        check=False,
        env=programs.environment(80),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [x.split(" ") for x in done.stdout.splitlines() if x.startswith("launch ")]
    launches, of_orders = launches[:17], launches[17:]
    assert [x[1].removesuffix("_kernel") for x in launches] == [
        "summarise",
        "total",
        "centre",
        "first_order",
        "h_bar",
        "pool_tiles",
        "disperse",
        "score",
        "limits",
        "route",
        "probe",
        "merge",
        "estimate",
        "fit",
        "ridge",
        "attend",
        "text",
    ]
    (row,) = [r for r in table if r.kernel == "attend" and r.variant == AMPERE]
    (attend,) = [x for x in launches if x[1] == "attend_kernel"]
    rows = re.fullmatch(r"queries/(\d+),pairs/1", row.grid)
    assert rows and attend[2:5] == [str(-(-315 // int(rows[1]))), "8", "1"] and attend[7] == "0"
    given = dict(zip(row.arguments, map(int, attend[8:]), strict=False))
    assert (given["heads"], given["group_size"], given["tokens"]) == (4, 2, 315)
    assert (given["text"], given["text_before"], given["stride_kb"]) == (5, 3, 2 * 320 * 64)
    assert given["scale"] == 0x3E000000
    refused = [x for x in done.stdout.splitlines() if x.startswith("refused ")]
    for line, said in zip(
        refused,
        [
            "no attend kernel for sm_80, float32",
            "do not fit a sequence",
            "budget is",
            "one self-attention",
            "does not broadcast",
            "do not go with 2 heads",
            "do not fit a sequence",
        ],
        strict=True,
    ):
        assert said in line
    kernels = [x[1].removesuffix("_kernel") for x in of_orders]
    assert kernels == [*ORDERED, "halve", "halve", "leaf"]
    assert "shape (2, 2, 315)" in done.stdout


def test_unsupported_variants(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="capability 75"):
        compile_table([Variant(75, "float16", 64, False)], tmp_path)
    with pytest.raises(ExportError, match="head_dim 20"):
        compile_table([Variant(90, "float16", 20, False)], tmp_path)


WIDEST = """
import json
from freqopt.kernels.specialise import specialisations
from freqopt.kernels.variant import CAPABILITIES, Variant
from without_code import shared_by
found = {}
for capability in (90,):
    variant = Variant(capability, "float32", 256, True)
    for given in specialisations(variant):
        if given.name in ("probe", "attend", "text"):
            shared = shared_by(given, variant)
            found[f"{given.name} {capability}"] = [shared, CAPABILITIES[capability]]
print(json.dumps(found))
"""


def test_the_widest_heads_in_float32_fit(tmp_path: Path) -> None:
    script = tmp_path / "widest.py"
    script.write_text(WIDEST)
    done = forks(interpret=False).run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 3 and all(shared <= room for shared, room in found.values()), found


def test_kernels_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CAPABILITIES, 90, 60_000)
    with pytest.raises(ExportError, match="bytes of shared memory and sm_90 has 60000"):
        compile_table([HOPPER], tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho ptxas is missing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(broken))
    with pytest.raises(NotAvailableError, match="ptxas is missing"):
        compile_table([Variant(90, "float16", 64, False)], tmp_path)
