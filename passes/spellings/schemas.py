"""Reads calls of attention operators that are not PyTorch's public one, by their declarations.

Which argument is the scale, which make attention other than plain, and which say nothing about the
result is told by their names, on which libraries agree. How the tensors lie is told by an argument,
by the shape of the log-sum-exp, or by the family that the operator's name says it is of.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.axes.foreign import is_foreign
from freqopt.passes.nodes import constant, raw_name, shape, tensor, value
from freqopt.passes.reasons import Reason, Why

SCALES = {"softmax_scale", "scale", "sm_scale", "scale_value", "attn_scale"}
OFF = {
    "causal": False,
    "is_causal": False,
    "dropout_p": 0.0,
    "dropout": 0.0,
    "p": 0.0,
    "softcap": 0.0,
    "logits_soft_cap": 0.0,
    "attention_chunk": 0,
    "keep_prob": 1.0,
    "sparse_mode": 0,
    "pre_tockens": 2147483647,
    "next_tockens": 2147483647,
}
"""Arguments that have to have this value for attention to be plain."""

WINDOWS = {"window_size", "window_size_left", "window_size_right", "window_left", "window_right"}
IDLE = {
    "return_softmax",
    "return_lse",
    "return_softmax_lse",
    "return_attn_probs",
    "deterministic",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "max_seqlen_q",
    "max_seqlen_k",
    "max_q",
    "max_k",
    "return_debug_mask",
    "compute_log_sumexp",
    "compute_logsumexp",
    "zero_tensors",
    "tensor_layout",
    "input_layout",
    "layout",
    "head_num",
    "backend",
    "smooth_k",
    "smooth_v",
    "qk_quant_gran",
    "pv_accum_dtype",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "philox_seed",
    "philox_offset",
    "enable_gqa",
    "cum_seq_q",
    "cum_seq_k",
    "unpadded_lse",
    "inner_precise",
    "gen_mask_parallel",
    "sync",
}
"""Arguments that do not change the result of plain attention on whole sequences."""

NAMES = (("query", "q"), ("key", "k"), ("value", "v"))
ATTENTION = re.compile(r"(attn|attention|flash|sage|fmha|sdpa)", re.IGNORECASE)
TOKENS_FIRST = re.compile(r"(flash|xformers|fmha|efficient|cutlass|aiter)", re.IGNORECASE)
PYTORCHS_OWN = re.compile(
    r"^(_scaled_dot_product_(flash|efficient|cudnn|fused)\w*|_flash_attention_forward|"
    r"_efficient_attention_forward)$"
)


@dataclass(frozen=True)
class Call:
    """One call of an attention operator.

    tokens_first: (B, N, H, D) instead of (B, H, N, D). packed: (N, H, D), one sequence without a
    batch. several: it returns more than the result. objection: why it cannot be replaced.
    """

    name: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float | None = None
    tokens_first: bool = False
    packed: bool = False
    several: bool = False
    objection: Why | None = None


def read_call(node: fx.Node) -> Call | None:
    """The call of an operator on three tensors shaped like an attention; None for all else."""
    own = isinstance(node.target, torch._ops.OpOverload) and PYTORCHS_OWN.match(raw_name(node))
    if not (own or is_foreign(node)):
        return None
    given = _arguments(node)
    if given is None or len(given) < 3:
        return None
    names = list(given)[:3]
    three = [given[name] for name in names]
    if not _is_attention(node, names, three):
        return None
    schema = getattr(node.target, "_schema", None)
    name = str(node.target if schema is None else schema.name)
    outputs = value(node)
    several = isinstance(outputs, (tuple, list))
    first = outputs[0] if several else outputs
    query, key, values = three
    if not isinstance(first, torch.Tensor) or len(first.shape) != len(shape(query)):
        return None

    def objects(problem: str) -> Call:
        why = Reason.OPAQUE(operation=name, problem=problem)
        return Call(name, query, key, values, several=several, objection=why)

    rest = {k: constant(v) if isinstance(v, fx.Node) else v for k, v in list(given.items())[3:]}
    problem = next((p for k, v in rest.items() if (p := _argument_problem(k, v)) is not None), None)
    if problem is not None:
        return objects(problem)
    packed = len(shape(query)) == 3
    if packed and not _one_sequence(rest):
        return objects("its tensors are not four-dimensional, nor one sequence by its cu_seqlens")
    first_tokens = True if packed else _tokens_first(name, rest, shape(query), outputs)
    if first_tokens is None:
        return objects("whether its tokens or its heads come first cannot be told")
    if not SCALES & set(rest):
        return objects("it has no argument for the scale")
    scale = next((rest[k] for k in rest if k in SCALES), None)
    if scale is not None and not isinstance(scale, (int, float)):
        return objects("its scale is computed at run time")
    own_scale = float(scale) if scale else None
    return Call(name, query, key, values, own_scale, first_tokens, packed, several)


def _arguments(node: fx.Node) -> Mapping[str, Any] | None:
    """Arguments by name, defaults included; None where they cannot be told."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        target = getattr(target, overloads[0]) if len(overloads) == 1 else target
    if isinstance(target, torch._ops.OpOverload):
        declared = target._schema.arguments
        given = {a.name: a.default_value if a.has_default_value() else None for a in declared}
        given |= dict(zip([a.name for a in declared], node.args, strict=False))
        return given | dict(node.kwargs)
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return bound.arguments


def _is_attention(node: fx.Node, names: list[str], three: list[Any]) -> bool:
    """Whether three arguments are queries, keys and values, by their names and shapes."""
    if not all(isinstance(item, fx.Node) and tensor(item) is not None for item in three):
        return False
    named = all(
        name.lower().strip("_") in known or name.lower().startswith((known[0], f"{known[1]}_"))
        for name, known in zip(names, NAMES, strict=True)
    )
    if not (named or ATTENTION.search(str(node.target))):
        return False
    query, key, values = (shape(item) for item in three)
    if len({len(query), len(key), len(values)}) != 1 or len(query) not in (3, 4):
        return False
    return same(query[-1], key[-1]) and all(
        same(a, b) for a, b in zip(key[:-1], values[:-1], strict=True)
    )


def _argument_problem(name: str, given: Any) -> str | None:
    """What an argument makes of attention that is not plain; None if nothing."""
    if given is None or name in IDLE or name in SCALES:
        return None
    if name in WINDOWS:
        sides = given if isinstance(given, (tuple, list)) else (given,)
        return None if all(side == -1 for side in sides) else f"it has a window ({name}={given})"
    if name in OFF and given == OFF[name]:
        return None
    if name in ("out", "rng_state", "gen") or isinstance(given, fx.Node):
        return f"it is given {name}"
    return f"it is given {name}={given}"


def _one_sequence(rest: Mapping[str, Any]) -> bool:
    """Whether the bounds of packed sequences are those of a single one: two numbers each."""
    bounds = [given for name, given in rest.items() if name.startswith(("cu_seqlens", "cum_seq"))]
    tensors = [given for given in bounds if isinstance(given, torch.Tensor)]
    return len(tensors) >= 2 and all(len(t.shape) == 1 and same(t.shape[0], 2) for t in tensors)


def _tokens_first(
    name: str, rest: Mapping[str, Any], query: tuple[Any, ...], outputs: Any
) -> bool | None:
    """Whether tensors are (B, N, H, D) and not (B, H, N, D); None if nothing tells."""
    said = next((rest[k] for k in ("tensor_layout", "input_layout", "layout") if k in rest), None)
    if said is not None:
        return {
            "NHD": True,
            "BSND": True,
            "BSHD": True,
            "HND": False,
            "BNSD": False,
            "BHSD": False,
        }.get(str(said))
    if name.startswith("aten::_scaled_dot_product"):
        return False
    others = outputs[1:] if isinstance(outputs, (tuple, list)) else ()
    sums = [o.shape for o in others if isinstance(o, torch.Tensor) and len(o.shape) == 3]
    if sums and not same(query[1], query[2]):
        if same(sums[0][1], query[2]) and same(sums[0][2], query[1]):
            return True
        if same(sums[0][1], query[1]) and same(sums[0][2], query[2]):
            return False
    return True if TOKENS_FIRST.search(name) else None
