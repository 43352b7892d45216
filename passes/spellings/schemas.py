"""Reads calls of attention operators that are not PyTorch's public one, by their declarations.

Which argument is the scale, which make attention other than plain, and which say nothing about the
result is told by their names, on which libraries agree. How the tensors lie is told by an argument,
by the shape of the log-sum-exp, or by the family that the operator's name says it is of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.axes.foreign import is_foreign
from freqopt.passes.nodes import constant, raw_name, shape, value
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Sizes
from freqopt.passes.spellings.declared import (
    ATTENTION,
    arguments_of,
    operands_in,
    shown_name,
    sizes_of,
)

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

OTHER_KINDS = re.compile(
    r"(?<![a-z])(causal|sparse|window|windowed|sliding|local|linear|recurrent|neighbou?rhood|"
    r"na[123]d|top_?[kp]|dilated|strided|streaming|gated|sigmoid|relu|bias|biased|alibi|relative|"
    r"rope|rotary|mla|paged|decode|lightning|retention|delta|pooled?|axial|differential|diff|sinks?)"
    r"(?![a-z])"
)
"""Words in a name, in small letters and set apart, for what no softmax over all pairs is."""

TOKENS_FIRST = re.compile(r"(flash|xformers|fmha|efficient|cutlass|aiter)", re.IGNORECASE)
PYTORCHS_OWN = re.compile(
    r"^(_scaled_dot_product_(flash|efficient|cudnn|fused)\w*|_flash_attention_forward|"
    r"_efficient_attention_forward)$"
)


@dataclass(frozen=True)
class Call:
    """One call of an attention operator.

    sizes: of its operands, guessed where nothing tells how they lie. tokens_first: (B, N, H, D)
    instead of (B, H, N, D). packed: (N, H, D), one sequence without a batch. several: it returns
    more than the result. objection: why it cannot be replaced.
    """

    name: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    sizes: Sizes
    scale: float | None = None
    tokens_first: bool = False
    packed: bool = False
    several: bool = False
    objection: Why | None = None


def read_call(node: fx.Node) -> Call | None:
    """The call of an operator on tensors shaped like an attention's; None for all else."""
    operators = torch._ops.OpOverload, torch._ops.OpOverloadPacket
    own = isinstance(node.target, operators) and PYTORCHS_OWN.match(raw_name(node))
    if not (own or is_foreign(node)):
        return None
    given = arguments_of(node)
    operands = None if given is None else operands_in(node, given)
    if given is None or operands is None:
        return None
    names, (query, key, values) = operands
    name = shown_name(node)
    outputs = value(node)
    several = isinstance(outputs, (tuple, list))
    first = outputs[0] if several and outputs else outputs
    rest = {
        k: constant(v) if isinstance(v, fx.Node) else v for k, v in given.items() if k not in names
    }
    first_tokens = _tokens_first(name, rest, shape(query), outputs)
    sizes = sizes_of(shape(query), shape(key), rest, first_tokens)

    def objects(problem: str) -> Call:
        why = Reason.OPAQUE(operation=name, problem=problem)
        return Call(name, query, key, values, sizes, several=several, objection=why)

    if outputs is None and (written := _written(node, given)):
        return objects(f"it writes its result into its argument {written}")
    if query is key or key is values:
        if not _is_attended(name, rest, first, key) or _is_taken_apart(outputs):
            return None
        return objects(f"it takes several of them as one tensor, {names[-1]}")
    if not isinstance(first, torch.Tensor) or len(first.shape) != len(shape(query)):
        return None
    if (kind := _other_kind(name)) is not None:
        return objects(f"its name says that it is not plain ({kind!r})")
    problem = next((p for k, v in rest.items() if (p := _argument_problem(k, v)) is not None), None)
    if problem is not None:
        return objects(problem)
    packed = len(shape(query)) == 3
    if packed and not _one_sequence(rest):
        return objects("its tensors are not four-dimensional, nor one sequence by its cu_seqlens")
    if not packed and first_tokens is None:
        return objects("whether its tokens or its heads come first cannot be told")
    if not SCALES & set(rest):
        return objects("it has no argument for the scale")
    scale = next((rest[k] for k in rest if k in SCALES), None)
    if scale is not None and not isinstance(scale, (int, float)):
        return objects("its scale is computed at run time")
    own_scale = float(scale) if scale else None
    tokens_first = packed or bool(first_tokens)
    return Call(name, query, key, values, sizes, own_scale, tokens_first, packed, several)


def _other_kind(name: str) -> str | None:
    """The word in an operator's name, or its library's, that makes it another attention."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    found = OTHER_KINDS.search(words)
    return found.group() if found else None


def _is_attended(name: str, rest: Mapping[str, Any], output: Any, joined: fx.Node) -> bool:
    """Whether an output is attention of the tensors that lie in one, by names and its shape."""
    named = ATTENTION.search(name) or (SCALES | {"causal", "is_causal"}) & set(rest)
    sizes = shape(joined)
    return bool(named) and isinstance(output, torch.Tensor) and len(output.shape) == len(sizes) - 1


def _is_taken_apart(outputs: Any) -> bool:
    """Whether several outputs are of one shape: queries, keys and values, normed or turned."""
    several = outputs if isinstance(outputs, (tuple, list)) else ()
    shapes = [tuple(each.shape) for each in several if isinstance(each, torch.Tensor)]
    return len(shapes) > 1 and shapes[0] == shapes[1]


def _written(node: fx.Node, given: Mapping[str, Any]) -> str | None:
    """The argument into which an operator writes that returns nothing."""
    schema = getattr(node.target, "_schema", None)
    for argument in () if schema is None else schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            return str(argument.name)
    return None


def _argument_problem(name: str, given: Any) -> str | None:
    """What an argument makes of attention that is not plain; None if nothing."""
    if given is None or name in IDLE or name in SCALES:
        return None
    if name in WINDOWS:
        sides = given if isinstance(given, (tuple, list)) else (given,)
        return None if all(side == -1 for side in sides) else f"it has a window ({name}={given})"
    if name in OFF and given == OFF[name]:
        return None
    if name in ("out", "rng_state", "gen") or isinstance(given, (fx.Node, torch.Tensor)):
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
