"""The generator: what one call launches, specialised for a GPU, a type and a head dim.

Kernels are written once; types, sizes and tile shapes are compile-time constants of theirs.
This module says which constants a variant has and compiles it, without a GPU: for reading
(`freqopt kernels show`), for exports, and for tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from freqopt.kernels.content_order import LEAF, RANK, SEGMENT_SAMPLES
from freqopt.kernels.forward import density, order, probe, routing, summaries
from freqopt.kernels.forward.density import RANK_BITS, RANK_BITS_ANEW
from freqopt.kernels.forward.long import ROUTE_STEP
from freqopt.kernels.hopper import attend as gluon_attend
from freqopt.kernels.hopper import gather as gluon_gather
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.hopper import prepare as gluon_prepare
from freqopt.kernels.hopper import score as gluon_score
from freqopt.kernels.portable import attend as triton_attend
from freqopt.kernels.portable import density as triton_density
from freqopt.kernels.portable import glue as triton_glue
from freqopt.kernels.portable import long as triton_long
from freqopt.kernels.portable import order as triton_order
from freqopt.kernels.portable import prepare as triton_prepare
from freqopt.kernels.portable import score as triton_score
from freqopt.kernels.tiles import launch_for, padded_dim
from freqopt.kernels.variant import CAPABILITIES, DTYPES, Variant

F32 = (
    "budget limits threshold key_mean spread head_spread sums first_order key_shift score "
    "peak mass peak_out mass_out exact_out missing_out logit logit_out moments coefficients "
    "probe_error partial covariance axes shift"
).split()
NATIVE = (
    "query key value key_out value_out key_var text_key text_value low_key low_value low_order "
    "sub_mean tile_square out tokens_of directions"
).split()
POINTERS = {
    **dict.fromkeys(F32, "*fp32"), "mass_term": "*fp16", "term": "*fp16", "term_out": "*fp16",
    "order": "*i64", "turn": "*i64", "route": "*i8", "exact_list": "*i32", "counts": "*i32",
    "key_mask": "*i1", "tile_list": "*i32", "packed": "*u8", "prefix": "*i32", "histogram": "*i32",
    "base": "*i64", "chunks": "*i32", "coordinates": "*fp16", "along": "*fp16", "position": "*i32",
    "target": "*i32", "ranks": "*i32",
}  # fmt: skip
"""Types of pointer arguments by name; those of NATIVE are the tensors' own.

As exported graphs pass them: PyTorch's token order is int32, an ONNX graph's int64.
"""

DESCRIPTORS = ("key", "value", "text_key", "text_value", "low_key", "low_value", "low_order")
"""Arguments of the Hopper attention kernel that are tensor descriptors instead of pointers."""


def _descriptors_of(function: Any) -> tuple[str, ...]:
    """The same of any Gluon kernel."""
    if function is gluon_prepare.prepare_hopper_kernel:
        return ("key_out", "value_out")
    if function is gluon_gather.gather_hopper_kernel:
        return tuple(name for name in DESCRIPTORS if name not in ("key", "value"))
    return DESCRIPTORS


DENSITY_CELLS = 8192
"""Scores per step of the search for a density's threshold: 16 to a thread."""


def _defaults(function: Any) -> dict[str, Any]:
    """Optional arguments of a kernel, which only long sequences pass, in the interpreter too."""
    arguments = inspect.signature(function.fn).parameters.items()
    return {name: a.default for name, a in arguments if a.default is not inspect.Parameter.empty}


class Specialised(NamedTuple):
    """One kernel with its compile-time constants.

    options: num_warps and num_stages; tile: rows, blocks or columns of one program, where the
    launch grid depends on them, else 0.
    """

    name: str
    function: Any
    constants: dict[str, Any]
    options: dict[str, int]
    tile: int

    def with_defaults(self, besides: tuple[str, ...] = ()) -> Specialised:
        """With the defaults of optional arguments as constants, but for those that are passed."""
        unset = _defaults(self.function)
        for name in besides:
            del unset[name]
        return self._replace(constants={**unset, **self.constants})

    def chosen(self) -> dict[str, Any]:
        """Constants that are not defaults."""
        unset = _defaults(self.function)
        return {
            name: value
            for name, value in self.constants.items()
            if name not in unset or value != unset[name]
        }


def specialisations(variant: Variant) -> Iterator[Specialised]:
    """Every kernel that one call launches, in no particular order; portable ones only.

    Those for text and for a density are launched by onnxruntime's library alone: PyTorch has its
    own.
    """
    for given in _chosen(variant):
        yield given.with_defaults(besides=_of_orders(given.function))
    if variant.content:
        yield from order_specialisations(variant)
        for given in _chosen(variant):
            if given.name in OF_OWN:
                constants = {**given.constants, "OWN": False}
                other = given._replace(name=f"{given.name}_other", constants=constants)
                yield other.with_defaults()


OF_OWN = ("route", "density")
"""Kernels that are others where the queries are not the keys' own tokens."""


def _of_orders(function: Any) -> tuple[str, ...]:
    """Arguments of a kernel that say whose order it reads, which exports pass at every launch."""
    optional = _defaults(function)
    if "order" in optional:
        return ()  # reads keys that are in order already
    return tuple(name for name in PASSED if name in optional)


def order_specialisations(variant: Variant) -> Iterator[Specialised]:
    """Every kernel that makes an order by content, as `forward.order` launches them.

    Those called halve_<tokens> are one kernel for segments of so many tokens.
    """
    for given in _chosen_of_order(variant):
        yield given.with_defaults(besides=_of_orders(given.function))


def _chosen_of_order(variant: Variant) -> Iterator[Specialised]:
    padded = max(padded_dim(variant.head_dim), RANK)
    size: dict[str, Any] = {"D": variant.head_dim, "DP": padded}
    kernels = triton_order

    def launch(warps: int) -> dict[str, int]:
        return {"num_warps": warps, "num_stages": 3}

    moments = {**size, "ROWS": order.SAMPLE_ROWS}
    yield Specialised("moments", kernels.moments_kernel, moments, launch(8), 0)
    directions = {**size, "SLICE": order.DIRECTION_SLICE}
    yield Specialised("directions", kernels.directions_kernel, directions, launch(8), 0)
    rows = order.PROJECT_ROWS
    project = {**size, "ROWS": rows}
    warps = order.PROJECT_WARPS
    yield Specialised("project", kernels.project_kernel, project, launch(warps), rows)
    piece = order.SEGMENT_PIECE
    segment = {"PIECE": piece, "PIECES": SEGMENT_SAMPLES // piece}
    yield Specialised("segment", kernels.segment_kernel, segment, launch(order.SEGMENT_WARPS), 0)
    ranked = launch(warps // 2)
    yield Specialised("rank_tokens", kernels.rank_tokens_kernel, {"ROWS": rows}, ranked, rows)
    divide = {"PIECE": order.DIVIDE_PIECE}
    yield Specialised("divide", kernels.divide_kernel, divide, launch(order.DIVIDE_WARPS), 0)
    for tokens, (warps, piece) in order.LEVELS.items():
        halve = {"SIZE": tokens, "STEP": max(tokens // SEGMENT_SAMPLES, 1), "PIECE": piece}
        name = f"halve_{tokens}"
        yield Specialised(name, kernels.halve_kernel, halve, launch(warps), tokens)
    yield Specialised("leaf", kernels.leaf_kernel, {"SIZE": LEAF}, launch(1), LEAF)


def _chosen(variant: Variant) -> Iterator[Specialised]:
    """Those kernels with the constants that a launch chooses."""
    dim = variant.head_dim
    shared = CAPABILITIES[variant.capability]
    launch = launch_for(getattr(torch, variant.dtype), dim, shared)
    size = {"D": dim, "DP": padded_dim(dim)}
    mask = {"HAS_MASK": variant.masked}
    precision = {"PRECISION": launch.precision}
    fit = {**size, **precision, "BP": launch.fit_rows, "BJ": launch.fit_columns}
    prepare, glue = triton_prepare, triton_glue
    few = {"num_warps": 4, "num_stages": 1}
    many = {"num_warps": 8, "num_stages": 1}
    streamed = {"num_warps": launch.order_warps, "num_stages": launch.order_stages}

    yield Specialised("limits", glue.limits_kernel, {}, {"num_warps": 1, "num_stages": 1}, 0)
    yield Specialised(
        "summarise",
        prepare.summarise_kernel,
        {**size, "GROUP": summaries.GROUP},
        {"num_warps": summaries.SUMMARY_WARPS, "num_stages": 1},
        summaries.GROUP,
    )
    first = {**size, "GROUP": summaries.ORDER_GROUP}
    yield Specialised("first", prepare.first_order_kernel, first, streamed, summaries.ORDER_GROUP)
    cols = min(summaries.TOTAL_COLS, padded_dim(dim))
    total = {**size, "COLS": cols, "ROWS": summaries.TOTAL_ROWS}
    yield Specialised("total", glue.total_kernel, total, few, cols)
    centre = {**size, "COLS": cols, "BJ": summaries.CENTRE_BLOCKS}
    yield Specialised("centre", glue.centre_kernel, centre, few, summaries.CENTRE_BLOCKS)
    cells = summaries.ORDER_CELLS
    yield Specialised("order", glue.order_kernel, {"CELLS": cells}, few, cells)
    yield Specialised("pool_tiles", triton_score.pool_tiles_kernel, size, few, 0)
    side = launch.disperse_side
    disperse = {**size, **precision, "BI": side, "BJ": side}
    yield Specialised("disperse", triton_score.disperse_kernel, disperse, few, side)
    yield Specialised(
        "score", triton_score.score_kernel,
        {**size, **precision, "TILES": launch.score_tiles, "BJ": launch.score_blocks,
         "WIDE": launch.score_wide},
        {"num_warps": launch.score_warps, "num_stages": launch.score_stages}, launch.score_tiles,
    )  # fmt: skip
    routed = {"num_warps": routing.ROUTE_WARPS, "num_stages": 1}
    yield Specialised("route", prepare.route_kernel, {"BJ": routing.ROUTE_BLOCKS}, routed, 0)
    yield Specialised(
        "probe",
        triton_attend.probe_kernel,
        {**size, **mask, **precision, "BP": launch.probe_rows},
        {"num_warps": 4, "num_stages": launch.probe_stages},
        launch.probe_rows,
    )
    rows = probe.MERGE_ROWS
    yield Specialised("merge", glue.merge_kernel, {**size, "BP": rows}, few, rows)
    yield Specialised("estimate", glue.estimate_kernel, fit, few, launch.fit_columns)
    fitting = {**fit, "ROWS": probe.FIT_ROWS}
    yield Specialised("fit", glue.fit_kernel, fitting, many, launch.fit_rows)
    yield Specialised(
        "attend", triton_attend.attend_kernel,
        {**size, **mask, **precision, "BM": launch.rows, "TEXT": True, "RAGGED": True,
         "WIDE": launch.wide},
        {"num_warps": launch.warps, "num_stages": launch.stages}, launch.rows,
    )  # fmt: skip
    yield Specialised(
        "density",
        triton_density.density_kernel,
        {"CELLS": DENSITY_CELLS},
        {"num_warps": 16, "num_stages": 1},
        0,
    )
    dense = {"num_warps": 4, "num_stages": launch.stages}
    rows = 32 if variant.dtype == "float32" and padded_dim(dim) > 128 else 64
    yield Specialised(
        "text", glue.text_kernel, {**size, **mask, **precision, "BM": rows}, dense, rows
    )


LONG = {
    "summarise": {"COPY": False},
    "first": {},
    "pool_tiles": {},
    "score": {},
    "probe": {"IN_PLACE": True, "BY_PROBE": True},
    "estimate": {"BY_PROBE": True},
    "attend": {"IN_PLACE": True},
}
"""Kernels that long sequences launch otherwise, and the constants they change. Calls whose probes
run beside the scores (`freqopt.kernels.overlap`) change those of BY_PROBE."""


PASSED = ("order_row", "order_share", "queries", "query_text", "query_before", "share")
"""Arguments of calls whose heads have orders of their own, or whose queries are other tokens, as
exports pass them."""

OF_ORDERS = frozenset((*PASSED, "key_order", "key_order_row", "log_sum", "log_sum_row"))
"""The same and more, as PyTorch passes them; defaults where a kernel is listed for reading."""


def long_specialisations(variant: Variant) -> Iterator[Specialised]:
    """Every kernel that one call on a long sequence launches through PyTorch; see forward.long."""
    for given in _chosen(variant):
        if given.name in ("density", "text", "route"):
            continue
        if given.name in LONG:
            params = given.function.params
            takes = tuple(
                p.name
                for p in params
                if p.has_default and not p.is_constexpr and p.name not in OF_ORDERS
            )
            given = given._replace(constants={**given.constants, **LONG[given.name]})
            yield given.with_defaults(besides=takes)
        else:
            yield given
    yield Specialised(
        "probe_tiles",
        triton_glue.probe_tiles_kernel,
        {"ROWS": routing.PROBE_TILES},
        {"num_warps": 1, "num_stages": 1},
        0,
    )
    rows = {"BJ": routing.ROUTE_BLOCKS, "LISTS": False}
    options = {"num_warps": routing.ROUTE_WARPS, "num_stages": 1}
    given = Specialised("probe_route", triton_prepare.route_kernel, rows, options, 0)
    yield given.with_defaults(besides=("tile_list",))
    few = {"num_warps": 4, "num_stages": 3}
    route = Specialised("route", triton_long.route_tiles_kernel, {"BJ": ROUTE_STEP}, few, 0)
    yield route.with_defaults()
    for bits, below in (*RANK_BITS, *RANK_BITS_ANEW):
        constants = {"BITS": bits, "BELOW": below, "CELLS": density.CELLS, "FIRST": False}
        name = f"rank_{below}"
        counting = Specialised(
            name, triton_density.histogram_kernel, constants, {**few, "num_warps": 8}, 0
        )
        yield counting.with_defaults()


def _has_gluon(variant: Variant) -> bool:
    """Whether the Gluon kernels serve calls of this variant; see hopper.applies."""
    half = variant.dtype != "float32"
    return variant.capability == 90 and half and variant.head_dim in hopper.STAGES


def hopper_specialisation(variant: Variant, *, long: bool = False) -> Specialised | None:
    """The Gluon attention kernel, where it serves calls of this variant."""
    if not _has_gluon(variant):
        return None
    dim = variant.head_dim
    constants = {"D": dim, "HAS_MASK": variant.masked, "STAGES": hopper.STAGES[dim]}
    function = gluon_gather.gather_hopper_kernel if long else gluon_attend.attend_hopper_kernel
    # What exports launch is told whose tokens the queries are; a long call in PyTorch is not here.
    passed: tuple[str, ...] = () if long else _of_orders(function)
    constants |= {} if long else {"OWN": False}
    given = Specialised("attend_hopper", function, constants, {"num_warps": 4}, 128)
    return given.with_defaults(besides=passed)


def hopper_preparation(variant: Variant, *, long: bool = False) -> Specialised | None:
    """The Gluon kernel of summaries and first-order products, which PyTorch alone launches."""
    if not _has_gluon(variant):
        return None
    dim = variant.head_dim
    constants = {"D": dim, "COPY": not long, "STAGES": hopper.PREPARE_STAGES[dim]}
    function = gluon_prepare.prepare_hopper_kernel
    return Specialised("prepare_hopper", function, constants, {"num_warps": 4}, 0).with_defaults()


def hopper_scores(variant: Variant, *, long: bool = False) -> Specialised | None:
    """The Gluon kernel of the scores, which PyTorch alone launches."""
    if not _has_gluon(variant):
        return None
    constants, tiles = {"D": variant.head_dim, "LISTED": long}, gluon_score.TILES.value
    function = gluon_score.score_hopper_kernel
    return Specialised("score_hopper", function, constants, {"num_warps": 4}, tiles).with_defaults()


def compile_specialised(given: Specialised, variant: Variant) -> Any:
    """Triton's CompiledKernel: `.asm` holds ttgir, ptx, cubin, ..; `.metadata` what it needs.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing; or a kernel that would need
            scratch memory, which none of ours may.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if not hasattr(given.function, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton runs in its interpreter, which compiles nothing; unset TRITON_INTERPRET"
        )
    own = DTYPES[variant.dtype]
    gluon = given.function.is_gluon()
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, argument in enumerate(given.function.arg_names):
        aligned = False
        if argument in given.constants:
            signature[argument] = "constexpr"
        elif gluon and argument in _descriptors_of(given.function):
            signature[argument] = f"tensordesc<{own}[64, 64],{gluon_attend.OPERAND.value!r}>"
        elif argument in NATIVE or argument in POINTERS:
            signature[argument] = POINTERS.get(argument, f"*{own}")
            aligned = argument != "key_mask"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
            # The strides are multiples of the head dim: tensors arrive contiguous.
            aligned = argument.startswith("stride_") and variant.head_dim % 16 == 0
            aligned = aligned and argument != "stride_mb"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if gluon else ASTSource)(
        given.function, signature, given.constants, attributes
    )
    target = GPUTarget("cuda", variant.capability, 32)
    made = triton.compile(source, target=target, options=given.options)
    if getattr(made.metadata, "global_scratch_size", 0):
        raise RuntimeError(f"{given.name} needs global scratch memory, which nobody would give it")
    return made
