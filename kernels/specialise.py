"""The generator: what one call launches, specialised for a GPU, a type and a head dim.

Kernels are written once; types, sizes and tile shapes are compile-time constants of theirs.
This module says which constants a variant has and compiles it, without a GPU: for reading
(`freqopt kernels show`), for exports, and for tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from freqopt.config import QUERY_TILE
from freqopt.kernels.forward.density import RANK_BITS, RANK_BITS_ANEW
from freqopt.kernels.hopper import attend as gluon_attend
from freqopt.kernels.hopper import gather as gluon_gather
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.hopper import prepare as gluon_prepare
from freqopt.kernels.hopper import score as gluon_score
from freqopt.kernels.launches import KernelLaunch, bind
from freqopt.kernels.order_launches import CONTENT_ORDER, numbers_of_order
from freqopt.kernels.split_launches import LISTED, RANKING, SPLIT, numbers_of
from freqopt.kernels.tiles import launch_for
from freqopt.kernels.variant import CAPABILITIES, DTYPES, Variant

F32 = (
    "budget limits threshold key_mean spread head_spread sums first_order key_shift score "
    "peak mass peak_out mass_out exact_out missing_out logit logit_out moments coefficients "
    "probe_energy probe_error partial covariance axes shift"
).split()
NATIVE = (
    "query key value key_out value_out key_var text_key text_value low_key low_value h_bar "
    "matrix sub_mean tile_square out tokens_of directions"
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

DESCRIPTORS = ("key", "value", "text_key", "text_value", "low_key", "low_value", "matrix")
"""Arguments of the Hopper attention kernel that are tensor descriptors instead of pointers."""


def _descriptors_of(function: Any) -> tuple[str, ...]:
    """The same of any Gluon kernel."""
    if function is gluon_prepare.prepare_hopper_kernel:
        return ("key_out", "value_out")
    if function is gluon_gather.gather_hopper_kernel:
        return tuple(name for name in DESCRIPTORS if name not in ("key", "value"))
    return DESCRIPTORS


def optional_arguments(function: Any) -> dict[str, Any]:
    """Optional arguments of a kernel with their defaults, in the interpreter too."""
    arguments = inspect.signature(function.fn).parameters.items()
    return {name: a.default for name, a in arguments if a.default is not inspect.Parameter.empty}


class Specialised(NamedTuple):
    """One kernel with its compile-time constants.

    options: num_warps and num_stages. axes: of the grid, extents and the parts of them that one
    program has; none where exports do not launch it.
    """

    name: str
    function: Any
    constants: dict[str, Any]
    options: dict[str, int]
    axes: tuple[tuple[str, int], ...] = ()

    def with_defaults(self, besides: tuple[str, ...] = ()) -> Specialised:
        """With the defaults of optional arguments as constants, but for those that are passed."""
        unset = optional_arguments(self.function)
        for name in besides:
            del unset[name]
        return self._replace(constants={**unset, **self.constants})

    def chosen(self) -> dict[str, Any]:
        """Constants that are not defaults."""
        unset = optional_arguments(self.function)
        return {
            name: value
            for name, value in self.constants.items()
            if name not in unset or value != unset[name]
        }


def specialisations(variant: Variant) -> Iterator[Specialised]:
    """Every kernel that one call launches; portable ones only.

    Those for text and for a density are launched by onnxruntime's library alone: PyTorch has its
    own. Called <name>_other are those that differ where queries are not the keys' own tokens.
    """
    for given in _chosen(variant):
        yield given.with_defaults(besides=_of_orders(given.function))
    if variant.content:
        yield from order_specialisations(variant)
        for given in _chosen(variant):
            if "OWN" in given.constants:
                constants = {**given.constants, "OWN": False}
                other = given._replace(name=f"{given.name}_other", constants=constants)
                yield other.with_defaults()


def _of_orders(function: Any) -> tuple[str, ...]:
    """Arguments of a kernel that say whose order it reads, which exports pass at every launch."""
    optional = optional_arguments(function)
    if "order" in optional:
        return ()  # reads keys that are in order already
    return tuple(name for name in PASSED if name in optional)


def order_specialisations(variant: Variant) -> Iterator[Specialised]:
    """Every kernel that makes an order by content, as `forward.order` launches them.

    Those called halve_<tokens> are one kernel for segments of so many tokens.
    """
    numbers = numbers_of_order(variant.head_dim)
    for launch in CONTENT_ORDER:
        given = _specialised(launch, numbers, variant.masked)
        yield given.with_defaults(besides=_of_orders(given.function))


def _specialised(launch: KernelLaunch, numbers: Mapping[str, Any], masked: bool) -> Specialised:
    """A launch with its numbers, and the constants that an export has of its calls."""
    bound = bind(launch, numbers)
    of_call = {name: masked if x == "masked" else x for name, x in launch.of_call.items()}
    constants = {**bound.constants, **of_call}
    return Specialised(launch.name, launch.kernel, constants, bound.options, bound.axes)


def _chosen(variant: Variant) -> Iterator[Specialised]:
    """Those of a split with the constants that a launch chooses."""
    dtype, dim = getattr(torch, variant.dtype), variant.head_dim
    numbers = numbers_of(launch_for(dtype, dim, CAPABILITIES[variant.capability]), dim)
    for launch in SPLIT:
        yield _specialised(launch, numbers, variant.masked)


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
        if given.name in ("density", "text"):
            continue
        if given.name == "route":  # of the probes; that of all tiles is another kernel
            given = given._replace(
                name="probe_route", constants={**given.constants, "LISTS": False}
            )
            yield given.with_defaults(besides=("tile_list",))
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
    for launch in LISTED:
        given = _specialised(launch, {}, variant.masked)
        name = "route" if launch.name == "route_tiles" else launch.name
        yield given._replace(name=name).with_defaults()
    counting = _specialised(RANKING[0], {}, variant.masked)
    for bits, below in (*RANK_BITS, *RANK_BITS_ANEW):
        constants = {**counting.constants, "BITS": bits, "BELOW": below}
        given = counting._replace(name=f"rank_{below}", constants=constants)
        yield given.with_defaults()


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
    axes = (("queries", QUERY_TILE), ("pairs", 1))
    given = Specialised("attend_hopper", function, constants, {"num_warps": 4}, axes)
    return given.with_defaults(besides=passed)


def hopper_preparation(variant: Variant, *, long: bool = False) -> Specialised | None:
    """The Gluon kernel of summaries and first-order products, which PyTorch alone launches."""
    if not _has_gluon(variant):
        return None
    dim = variant.head_dim
    constants = {"D": dim, "COPY": not long, "STAGES": hopper.PREPARE_STAGES[dim]}
    function = gluon_prepare.prepare_hopper_kernel
    return Specialised("prepare_hopper", function, constants, {"num_warps": 4}).with_defaults()


def hopper_scores(variant: Variant, *, long: bool = False) -> Specialised | None:
    """The Gluon kernel of the scores, which PyTorch alone launches."""
    if not _has_gluon(variant):
        return None
    constants = {"D": variant.head_dim, "LISTED": long}
    function = gluon_score.score_hopper_kernel
    return Specialised("score_hopper", function, constants, {"num_warps": 4}).with_defaults()


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
