"""The attention backend "freqopt" of diffusers' dispatcher, registered as its own backends are.

Serves modules whose processors hand their attention to the dispatcher, whatever backend was chosen
for them. Where a sequence is spread over several GPUs the dispatcher gathers tokens and spreads
heads; which heads are here is told to what serves them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqopt.capture.looking import is_looking
from freqopt.eager.calling import is_serving, share_of_heads
from freqopt.errors import InputError, OptionError

NAME = "freqopt"
CHOSEN = "_attention_backend"
"""Attribute of a processor for the backend that was chosen for it."""

SUPPORTED = "_SUPPORTED_BACKENDS"
"""Attribute of a processor that takes no other backends."""


class Chosen(str):
    """Our name, as a processor of a served model has it: a copy of it is what was chosen before.

    A copy or a pickle of the model is served by nobody, and knows nothing of us.
    """

    before: Any

    def __new__(cls, before: Any) -> Chosen:
        """before: what was chosen before."""
        found = super().__new__(cls, NAME)
        found.before = before
        return found

    @property
    def value(self) -> str:
        """As the members of the dispatcher's enumeration have it."""
        return NAME

    def __copy__(self) -> Any:
        return self.before

    def __deepcopy__(self, memo: object) -> Any:
        return self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.before,)


def _itself(found: Any) -> Any:
    return found


def choose(modules: Iterable[nn.Module]) -> list[Any]:
    """Have the dispatcher hand the attention of modules to us; the processors that do."""
    processors = [getattr(module, "processor", None) for module in modules]
    found = [
        processor
        for processor in processors
        if hasattr(processor, CHOSEN) and NAME in getattr(processor, SUPPORTED, (NAME,))
    ]
    if found:
        register()
    for processor in found:
        before = getattr(processor, CHOSEN)
        if not isinstance(before, Chosen):  # one of several modules, too
            setattr(processor, CHOSEN, Chosen(before))
    return found


def restore(processors: Iterable[Any]) -> None:
    """Give processors back the backends that were chosen for them, where ours still are."""
    for processor in processors:
        chosen = getattr(processor, CHOSEN, None)
        if isinstance(chosen, Chosen):
            setattr(processor, CHOSEN, chosen.before)


@functools.cache
def register() -> Any:
    """The backend's name as the dispatcher knows it.

    Its names are an enumeration, which is given another member as other libraries give it theirs.
    """
    from diffusers.models import attention_dispatch as theirs

    names: Any = theirs.AttentionBackendName
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[member._name_] = member
        names._value2member_map_[NAME] = member
        names._member_names_.append(member._name_)
        type.__setattr__(names, member._name_, member)
        registry = theirs._AttentionBackendRegistry
        checks = [theirs._check_device, theirs._check_shape]
        registry.register(member, constraints=checks, supports_context_parallel=True)(_attention)
    return names(NAME)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention of (B, N, H, D) tensors, as the dispatcher calls its backends.

    Raises:
        OptionError: no plan is on the model.
        InputError: log-sum-exps are wanted, or tokens are spread over a ring of GPUs.
    """
    # In a graph it is attention like any other, which is split there.
    if not (is_serving() or is_looking() or torch.compiler.is_compiling()):
        raise OptionError(
            "set_attention_backend('freqopt') was called and no plan is on the model: "
            "freqopt.optimize(pipe, plan, route='eager') puts it there, and chooses this backend"
        )
    if return_lse:
        raise InputError("log-sum-exps were asked for, which the backend 'freqopt' does not return")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # which keys each batch item has
    if _parallel_config is None:
        query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return found.permute(0, 2, 1, 3)
    from diffusers.models import attention_dispatch as theirs

    spread = _parallel_config.context_parallel_config
    if spread.ring_degree > 1:
        raise InputError(
            f"tokens are spread over a ring of {spread.ring_degree} GPUs, where no GPU sees all "
            "keys; spread them by heads instead: ContextParallelConfig(ulysses_degree=...)"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise InputError("gradients of attention spread over several GPUs are not supported")
    mesh = spread._ulysses_mesh
    with share_of_heads(mesh.get_local_rank(), spread.ulysses_degree):
        gathered: Tensor = theirs._templated_context_parallel_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            return_lse,
            forward_op=theirs._native_attention_forward_op,
            backward_op=theirs._native_attention_backward_op,
            _parallel_config=_parallel_config,
        )
    return gathered
