"""Other ways to save time, put on a model and taken off again: what benchmarks.composition joins.

Each is a public way of its library: torch.compile's modes, diffusers' first-block cache and pyramid
attention broadcast, cache-dit, torchao's linear layers of eight bits, guidance by a second branch.
One that is not here says what brings it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from freqopt.models_zoo.video_dit import Block

NOTHING, CACHE, CACHE_DIT, GUIDANCE, EAGER, BROADCAST, GRAPHS, FP8, INT8 = (
    "nothing else",
    "first-block cache",
    "cache-dit",
    "guidance",
    "no compiler",
    "attention broadcast, no compiler",
    "CUDA graphs",
    "FP8 linear layers",
    "INT8 linear layers",
)
ADDITIONS = {
    "nothing": NOTHING,
    "cache": CACHE,
    "cache-dit": CACHE_DIT,
    "guidance": GUIDANCE,
    "eager": EAGER,
    "broadcast": BROADCAST,
    "graphs": GRAPHS,
    "fp8": FP8,
    "int8": INT8,
}
"""By their names on the command line."""

QUANTISED = (FP8, INT8)

NOT_COMPILED = (EAGER, BROADCAST)
"""The broadcast counts calls of attention inside the blocks: each would be compiled anew."""

OF_STEPS = (GRAPHS, CACHE_DIT, GUIDANCE, EAGER, BROADCAST)
"""What is measured on steps of a large model only, and on no clip."""

SCALE = 5.0
"""Of guidance: how far the output goes from that without the text towards that with it."""

EVERY = 2
"""Calls of an attention of which the broadcast computes one."""


class Absent(Exception):
    """Something that a row needs is not here; the message says what brings it."""


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it was not."""
    try:
        return measure()
    except Absent as why:
        return {"absent": str(why)}
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:200]}"}


def how_to_compile(split: dict[str, Any] | None, addition: str) -> dict[str, Any]:
    """Arguments of torch.compile for a dense model, or with options of the split."""
    mode = {"mode": "reduce-overhead"} if addition == GRAPHS else {}
    return mode if split is None else {"backend": "freqopt", "options": {**split, **mode}}


@contextmanager
def compiled(model: nn.Module, how: dict[str, Any]) -> Iterator[None]:
    """A model whose blocks' forward is compiled: hooks around it, as of caches, run in Python."""
    blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, **how)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        torch._dynamo.reset()


@contextmanager
def cached(model: nn.Module, threshold: float, computed: list[bool]) -> Iterator[None]:
    """diffusers' first-block cache on a model; `computed` gets whether each call ran the rest.

    Raises:
        Absent: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise Absent("diffusers is not installed: `pip install diffusers`")
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook

    decide = FBCHeadBlockHook._should_compute_remaining_blocks

    def decided(hook: Any, residual: Tensor) -> bool:
        computed.append(bool(decide(hook, residual)))
        return computed[-1]

    owner: Any = model
    with mock.patch.object(FBCHeadBlockHook, "_should_compute_remaining_blocks", decided):
        owner.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        try:
            yield
        finally:
            owner.disable_cache()


@contextmanager
def cached_by_cache_dit(
    model: nn.Module, threshold: float, steps: int, computed: list[bool]
) -> Iterator[None]:
    """cache-dit's cache on a model; `computed` gets whether each call ran all blocks.

    steps: calls of a clip, after which it begins anew.

    Raises:
        Absent: cache-dit is not installed.
    """
    if importlib.util.find_spec("cache_dit") is None:
        raise Absent("cache-dit is not installed: `pip install cache-dit`")
    import cache_dit
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern

    config = DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        residual_diff_threshold=threshold,
        num_inference_steps=steps,
    )
    blocks: Any = model.blocks

    def begins(*_: object) -> None:
        computed.append(False)

    def goes_on(*_: object) -> None:
        computed[-1] = True

    hooks = [
        blocks[0].register_forward_pre_hook(begins),
        blocks[1].register_forward_pre_hook(goes_on),
    ]
    adapter = BlockAdapter(
        transformer=model, blocks=blocks, forward_pattern=ForwardPattern.Pattern_2
    )
    try:
        cache_dit.enable_cache(adapter, cache_config=config)
        yield
    finally:
        cache_dit.disable_cache(model)
        for hook in hooks:
            hook.remove()


@contextmanager
def broadcast(model: nn.Module, times: Callable[[], float], computed: list[bool]) -> Iterator[None]:
    """diffusers' pyramid attention broadcast; `computed` gets whether each attention was computed.

    times: tells the timestep of the call. Self-attention is computed in every `EVERY`-th call.

    Raises:
        Absent: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise Absent("diffusers is not installed: `pip install diffusers`")
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook as Hook

    run = Hook.new_forward

    def noted(hook: Any, *args: Any, **kwargs: Any) -> Any:
        before = hook.state.cache
        found = run(hook, *args, **kwargs)
        computed.append(found is not before)
        return found

    owner: Any = model
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=EVERY,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=times,
    )
    with mock.patch.object(Hook, "new_forward", noted):
        owner.enable_cache(config)
        try:
            yield
        finally:
            owner.disable_cache()


class Guided(NamedTuple):
    """Calls of a model with two branches, with the text and without, as one batch."""

    calls: list[dict[str, Any]]

    @classmethod
    def of(cls, calls: list[dict[str, Any]]) -> Guided:
        """Those of calls with a text; the other branch's text is zeros."""
        return cls([{name: _both(name, x) for name, x in call.items()} for call in calls])

    @staticmethod
    def joined(output: Tensor) -> Tensor:
        """The guided output of both branches'."""
        with_text, without = output.chunk(2)
        return without + SCALE * (with_text - without)


def _both(name: str, x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.cat([x, torch.zeros_like(x) if name == "encoder_hidden_states" else x])


@contextmanager
def anew(model: nn.Module) -> Iterator[None]:
    """A cache, where there is one, knows nothing of earlier clips, and that these calls are one."""
    owner: Any = model
    if not hasattr(owner, "cache_context"):
        yield
        return
    owner._reset_stateful_cache()  # of the context, too
    with owner.cache_context("one"):
        yield


def make_cacheable(model: nn.Module) -> None:
    """Tell diffusers' caches of the zoo's model, which is none of diffusers' own.

    Raises:
        Absent: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise Absent("diffusers is not installed: `pip install diffusers`")
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.cache_utils import CacheMixin

    known = TransformerBlockMetadata(
        return_hidden_states_index=0, _cached_parameter_indices={"hidden_states": 0}
    )
    TransformerBlockRegistry.register(Block, known)
    kind = type(model)
    if not issubclass(kind, CacheMixin):
        model.__class__ = type(kind.__name__, (CacheMixin, kind), {})


def quantise(model: nn.Module, addition: str) -> None:
    """Linear layers of the blocks in FP8 or INT8, by torchao, in place; they do not come back.

    Raises:
        Absent: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise Absent("torchao is not installed: `pip install torchao`")
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if addition == FP8:
        config: Any = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    else:
        config = Int8DynamicActivationInt8WeightConfig()
    quantize_(
        model,
        config,
        lambda module, name: isinstance(module, nn.Linear) and name.startswith("blocks."),
    )
