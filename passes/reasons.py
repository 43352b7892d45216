"""Why an attention is split or stays dense: one name for each reason, and its sentence.

Code compares names. Sentences, with what was seen put into them, are for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

EVAL = "call model.eval(), or set its dropout to 0"


class Text(NamedTuple):
    """What was seen, and what to do about it, if there is something to be done."""

    seen: str
    advice: str = ""


class Reason(Enum):
    """Every reason; calling one with the details of its text gives a `Why`."""

    # Of what is, or may be, split
    FITS = Text("dense attention on a known grid{remark}")
    FITS_BY_CONTENT = Text("dense attention, by content ({instead})")
    BY_MODULE = Text("by the budget attached to its module")
    BY_PLAN = Text("by the plan")
    BY_THRESHOLD = Text("threshold {threshold:g}")
    BY_DENSITY = Text("without a plan, at density {density:g}")
    MEASURED = Text("it is measured")

    # Forms of attention
    CAUSAL = Text("it is causal (is_causal=True)")
    DROPOUT = Text("it has dropout ({sign})", EVAL)
    RUNTIME_SCALE = Text("its scale is computed at run time")
    SCORES_CHANGED = Text("its scores go through {operation} before the softmax")
    WEIGHTS_CHANGED = Text("its attention weights go through {operation} beside the softmax")
    SCORES_USED = Text("its scores are used elsewhere too")
    WEIGHTS_USED = Text("its attention weights are used elsewhere too")
    OVERWRITTEN = Text("its queries, keys or values are overwritten before it is through")
    FLEX_OUTPUTS = Text("it is FlexAttention whose logsumexp or largest scores are used too")
    FLEX_SCORES = Text("it is FlexAttention with a score function (score_mod)")
    FLEX_BLOCKS = Text("it is FlexAttention with a block mask, which makes it sparse already")
    PACKED = Text("nn.MultiheadAttention was not opened")
    PACKED_MASK = Text(
        "nn.MultiheadAttention was given an attn_mask; a key_padding_mask over text is read"
    )
    PACKED_PADDING = Text(
        "its key_padding_mask is added to the scores; only a compiler sees a bool one"
    )
    PACKED_KEYS = Text("nn.MultiheadAttention adds keys of its own (add_bias_kv or add_zero_attn)")
    PACKED_STATIC = Text(
        "nn.MultiheadAttention was given its keys or values ready-made (static_k, static_v)"
    )
    PACKED_BATCH = Text("nn.MultiheadAttention's query {shape} has no batch")
    PACKED_WEIGHTS = Text("its attention weights are used elsewhere too", "pass need_weights=False")
    FAST_PATH = Text(
        "{operation} is one node with all around it",
        "call torch.backends.mha.set_fastpath_enabled(False) before compiling",
    )

    OPAQUE = Text(
        "it is inside the operator {operation}, and {problem}",
        "use PyTorch's scaled_dot_product_attention to have it split (in diffusers: "
        "set_attention_backend('native'))",
    )

    # Tensors
    NO_HEADS = Text("its tensors are not (batch, heads, tokens, head_dim): {shape}")
    BATCHES = Text("its queries, keys and values have different batch sizes")
    SHAPES = Text("its keys {keys} and values {values} differ in heads or head_dim")

    DISTRIBUTED = Text(
        "its tensors are DTensors, whose collectives no graph shows: it may attend over keys of "
        "other ranks too, as under torch's context_parallel",
        "share the sequence by functional collectives (diffusers: ulysses_degree), or call "
        "freqopt.parallel.over_all_keys",
    )

    FILLED = Text(
        "collectives fill what its queries, keys or values are read from in a way that is not "
        "followed (a part, a view, or by one rank): these may be tokens of other ranks",
        "let them fill a tensor of its own as a whole, and read that one",
    )

    # Tokens of queries, keys and values
    READY_MADE = Text(
        "its queries and keys come into this graph ready-made, after a graph break, so that what "
        "they are of cannot be told",
        "freqopt.inspect says where the break is; where hooks break it (offloading, casting, a "
        "step cache), a plan tells: freqopt.attach(model, plan)",
    )
    NOT_CALLED = Text(
        "no attention was met there, without a compiler",
        "what is written by hand is met under torch.no_grad, not torch.inference_mode, where it "
        "writes nothing in place; torch.compile serves the rest; transformers has "
        'attn_implementation="sdpa"',
    )
    NO_AXES = Text("where its tokens come from cannot be followed in this graph")
    CROSS = Text("its queries and its keys are of different tokens")
    CACHE = Text(
        "its keys are a cache, or made elsewhere: they enter this graph ready-made, and are not "
        "the queries' own tokens",
        'an order by content needs no grid: pass order="content"',
    )
    OTHER_KEYS = Text("its keys cover other tokens than its queries")
    MANY_KEYS = Text("its keys have {others} tokens more than its queries: too many to fill up")
    OTHER_VALUES = Text("its values are of other tokens than its keys")
    SLICES = Text("it attends within {axes} slices of the video (windowed, temporal or spatial)")
    LENGTHS = Text("its {queries} queries and {keys} keys are not provably as many")
    KEY_ORDER = Text("its keys are not provably in the order of its queries")

    # Grids
    LOST = Text(
        "where its tokens come from cannot be followed in this graph", "pass grid=(t, h, w)"
    )
    NO_GRID = Text(
        "its tokens are one axis of the input {inputs}, which has no grid (text, audio, or video "
        "packed before the model)",
        "if they are video, pass grid=(t, h, w); an image is (1, h, w), one long sequence "
        "(1, 1, n)",
    )
    IN_POSITIONS = Text(
        "its tokens are packed into one axis, and {input} holds their positions, in this call "
        "of a grid {grid}",
        "pass grids=[that grid] or a plan, and the grid of every call is read from there",
    )
    GRIDS_ALIKE = Text(
        "the grids {grids} have as many tokens, and nothing in this graph tells which a call is on",
        "pass the one as grid=, or compile the whole model, whose inputs may hold positions",
    )
    CALL_MISFIT = Text(
        "the model was called with tokens on a grid {grids}, and this attention's {tokens} tokens "
        "are not those and text where calibration saw some",
        "calibrate with a call like this one",
    )
    TEXT_UNTOLD = Text(
        "it has {tokens} tokens, another number than calibration saw, and nothing tells how many "
        "of them are text: they may lie on another grid",
        "calibrate with a call of this length, or with a model that is told the grid of its tokens",
    )
    CALL_UNTOLD = Text(
        "the model is told the grid of its tokens as the numbers {arguments}, and this call has "
        "none of a grid there",
        "call it with ints, as when it was calibrated",
    )
    IN_PIECES = Text(
        "its video tokens lie in {count} pieces with others between them, as where text and video "
        "are sharded one by one",
        "join them before they are sharded",
    )
    PLACED = Text(
        "its tokens are put in their places by index, and their order cannot be read from the graph"
    )
    GRID_MISFIT = Text(
        "grid={grid} was given, {shown} = {tokens} tokens, but of its {sizes} tokens {how_many} "
        "that many"
    )
    GRID_UNPROVEN = Text("grid {grid} does not provably have the {video} video tokens")
    SEVERAL_GRIDS = Text("its tokens are several grids in one sequence ({grids})")
    TILES = Text("its tokens lie in tiles, not in raster order")
    AXES = Text("its tokens lie on more than three axes or in tiles ({shape}), not in raster order")
    EXTENT_UNREADABLE = Text("an extent of its grid cannot be read where the attention is")
    TEXT_UNREADABLE = Text("the number of its text tokens cannot be read in the graph")
    PADS_UNREADABLE = Text("the number of tokens that only its keys have cannot be read")

    # Masks
    MASK_NO_TENSOR = Text("its mask is not a tensor")
    MASK_ADDED = Text(
        "its mask is added to the scores ({dtype}); bool masks over text are supported"
    )
    MASK_PAIRS = Text(
        "its mask of shape {shape} differs between queries or heads; (batch, 1, 1, keys) is "
        "supported"
    )
    MASK_BATCH = Text("its mask has a batch of {batch} where the queries have {queries}")
    MASK_UNPROVEN = Text(
        "its mask may hide video tokens: that it does not cannot be proven from the graph"
    )
    MASK_UNLIKE = Text(
        "its mask hides video tokens in this call, or differs between queries, unlike those that "
        "calibration saw",
        "a mask that hides text only is split",
    )

    TRANSFORMED = Text(
        "it is called inside torch.jit.trace or a transform of torch.func (vmap, grad), which is "
        "not followed there",
        "call the model without, or compile it",
    )
    REPLACED = Text(
        "its module is in the model no more, and what is in its place has no budget",
        "replace modules first, or handle.disable() and freqopt.optimize the model again",
    )
    CHECKPOINT_INSIDE = Text(
        "an activation checkpoint inside its module runs it once more in the backward pass, where "
        "nothing tells which module it is of",
        "put the checkpoint around the module or its block, or compile it",
    )

    # Decisions about sites that could be split
    NO_KERNEL = Text("{problem}")
    TOO_SHORT = Text("{tokens} tokens are fewer than min_tokens = {least}")
    SHARED = Text(
        "after a graph break one graph serves several layers here, and does not tell which",
        "call freqopt.attach(model, plan) and leave the plan out of the options",
    )
    NOT_PLANNED = Text("the plan has no budget for it", "calibrate again")
    PLANNED_DENSE = Text("by the plan: {reason}")
    HEADS_UNTOLD = Text(
        "it has {heads} of the plan's {planned} heads here, and which of them this process has "
        "cannot be told from the graph",
        "share heads out by functional collectives (all_to_all_single), or compile the whole block",
    )
    IN_A_BODY = Text(
        "it lies inside a higher-order operator's subgraph", "export without checkpointing"
    )
    FAILED = Text("rewriting it failed: {error}")

    def __call__(self, **details: object) -> Why:
        """This reason with what was seen."""
        return Why(self, details)


@dataclass(frozen=True)
class Why:
    """A reason and what was seen, under the names that are in its text."""

    reason: Reason
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def seen(self) -> str:
        """What was seen, without advice."""
        text: Text = self.reason.value
        return text.seen.format(**self.details)

    def __str__(self) -> str:
        text: Text = self.reason.value
        return f"{self.seen}: {text.advice}" if text.advice else self.seen


UNTRACED = frozenset(
    {
        Reason.READY_MADE,
        Reason.NO_AXES,
        Reason.OTHER_KEYS,
        Reason.OTHER_VALUES,
        Reason.LENGTHS,
        Reason.KEY_ORDER,
        Reason.LOST,
        Reason.NO_GRID,
        Reason.GRID_MISFIT,
        Reason.GRID_UNPROVEN,
        Reason.SEVERAL_GRIDS,
        Reason.EXTENT_UNREADABLE,
        Reason.TEXT_UNREADABLE,
        Reason.TEXT_UNTOLD,
    }
)
"""Reasons that say that a graph does not show which tokens there are, or how they lie.

What calibration saw of a site is believed there, and an order by content, which needs no grid, can
serve it; each of the two goes on from this list (`known.UNSHOWN`, `content.UNPLACED`).
"""
