"""Attention inside operators of other libraries: replaced where it is plain, else listed.

The operators here declare what those of flash-attn, SageAttention, xformers and vendors declare.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from passes_toys import DIM, HEADS, WIDTH, sites_of
from torch import Tensor, nn

from freqopt.errors import SiteError
from freqopt.passes.reasons import Reason

GRID = (3, 6, 10)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """(B, N, H, D)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()


def sums(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("flash_toys::fwd", mutates_args=())
def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor]:
    return dense(q, k, v, softmax_scale), sums(q)


@torch.library.custom_op("flash_toys::varlen_fwd", mutates_args=())
def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    return dense(q[None], k[None], v[None], softmax_scale)[0].clone()


@torch.library.custom_op("sage_toys::sageattn", mutates_args=())
def sage(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool, sm_scale: float | None
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=sm_scale)


@torch.library.custom_op("vendor_toys::fused_attention", mutates_args=())
def vendor(query: Tensor, key: Tensor, value: Tensor, flavour: int) -> Tensor:
    return dense(query, key, value)


@torch.library.custom_op("vendor_toys::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x * gate.sigmoid() * up


@torch.library.custom_op("flash_toys::slidingWindowFlashAttn", mutates_args=())
def sliding(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    near = (torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])).abs() < 20
    turned = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*turned, attn_mask=near, scale=softmax_scale)
    return out.transpose(1, 2).contiguous()


@sliding.register_fake
def _sliding(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@flash.register_fake
def _flash(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), sums(q)


@varlen.register_fake
def _varlen(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@sage.register_fake
def _sage(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@vendor.register_fake
def _vendor(query: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(query)


@gated.register_fake
def _gated(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vendor_toys::attention_with_output", mutates_args=("out",))
def into_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    out.copy_(dense(q, k, v, scale))


@torch.library.custom_op("flash_toys::qkvpacked", mutates_args=())
def joined(qkv: Tensor, causal: bool) -> Tensor:
    return dense(*qkv.unbind(2))


@torch.library.custom_op("flash_toys::kvpacked", mutates_args=())
def half_joined(q: Tensor, kv: Tensor, causal: bool) -> Tensor:
    return dense(q, *kv.unbind(2))


@torch.library.custom_op("vendor_toys::qkv_norm", mutates_args=())
def norm(qkv: Tensor, eps: float) -> Tensor:
    return qkv / (qkv.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.library.custom_op("flash_toys::qkv_rope", mutates_args=())
def turned(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return q * table, k * table, v.clone()


@turned.register_fake
def _turned(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(qkv[:, :, 0]) for _ in range(3))
    return q, k, v


@into_out.register_fake
def _into_out(*rest: object) -> None:
    return None


@joined.register_fake
def _joined(qkv: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(qkv[:, :, 0])


@half_joined.register_fake
def _half_joined(q: Tensor, kv: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(q)


@norm.register_fake
def _norm(qkv: Tensor, eps: float) -> Tensor:
    return torch.empty_like(qkv)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def call_flash(causal: bool = False, left: int = -1, scale: float | None = 0.2) -> Attend:
    return lambda q, k, v: flash(q, k, v, 0.0, scale, causal, left, -1, 0.0, None, False)[0]


def call_varlen(parts: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = torch.linspace(0, q.shape[0] * q.shape[1], parts + 1).int()
        rows = [x.flatten(0, 1) for x in (q, k, v)]
        out = varlen(*rows, bounds, bounds, q.shape[1], q.shape[1], None, False)
        return out.unflatten(0, q.shape[:2])

    return attend


def call_sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return sage(*turned, "HND", False, 0.3).transpose(1, 2)


def use_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, total = flash(q, k, v, 0.0, None, False, -1, -1, 0.0, None, False)
    return out * total.transpose(1, 2)[..., None].exp()


def call_into_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    into_out(out, q, k, v, 0.2)
    return out


class Video(nn.Module):
    """Text before a video, and one attention of (B, N, H, D) tensors."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.patch = attend, nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.attn = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, video: Tensor, words: Tensor) -> Tensor:
        x = torch.cat([words, self.patch(video).flatten(2).transpose(1, 2)], 1)
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)) for f in self.attn)
        return self.attend(q, k, v).flatten(2).view(x.shape[0], -1)


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    t, h, w = GRID
    return torch.randn(batch, 4, t, 2 * h, 2 * w), torch.randn(batch, 7, WIDTH)


@pytest.mark.parametrize(
    ("attend", "batch"),
    [(call_flash(), 2), (call_flash(scale=None), 1), (call_varlen(1), 1), (call_sage, 2)],
)
def test_plain_attention_of_others_is_split(attend: Attend, batch: int) -> None:
    model, given = Video(attend).eval(), inputs(batch)
    options = {"threshold": 0.0, "min_tokens": 0, "strict": True, "inner": "eager"}
    seen: list[str] = []

    def inner(gm: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*given)
        got = torch.compile(model, backend="freqopt", options=options | {"inner": inner})(*given)
    assert seen.count("freqopt.split_attention.default") == 1
    assert not any("toys" in name for name in seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    (site,) = sites_of(model, *given)
    assert (site.grid, site.text_before, site.text_after) == (GRID, 7, 0)


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (call_flash(causal=True), "causal"),
        (call_flash(left=16), "window"),
        (call_varlen(3), "one sequence"),
        (use_sums, "log-sum-exp"),
        (lambda q, k, v: vendor(q, k, v, 3), "flavour"),
        (lambda q, k, v: sliding(q, k, v, 0.2), "not plain ('sliding')"),
        (call_into_out, "writes its result into its argument out"),
        (lambda q, k, v: joined(torch.stack([q, k, v], 2), False), "one tensor, qkv"),
        (lambda q, k, v: half_joined(q, torch.stack([k, v], 2), False), "one tensor, kv"),
    ],
)
def test_other_attention_of_others_is_listed_and_left_alone(attend: Attend, said: str) -> None:
    model, given = Video(attend).eval(), inputs(1)
    (site,) = sites_of(model, *given)
    assert site.why.reason is Reason.OPAQUE and said in site.reason
    assert (site.heads, site.kv_heads, site.head_dim, site.kind) == (HEADS, HEADS, DIM, "self")
    assert site.query_length == site.key_length == 187
    torch._dynamo.reset()
    options = {"threshold": 0.0, "min_tokens": 0, "inner": "eager"}
    with torch.no_grad():
        got = torch.compile(model, backend="freqopt", options=options)(*given)
        torch.testing.assert_close(got, model(*given), rtol=1e-4, atol=1e-5)


def test_three_tensors_alone_are_no_attention() -> None:
    assert sites_of(Video(lambda q, k, v: gated(q, k, v)), *inputs(1)) == []

    def first_normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return norm(torch.stack([q, k, v], 2), 1e-5)[:, :, 0].contiguous()

    assert sites_of(Video(first_normed), *inputs(1)) == []

    def all_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(*turned(torch.stack([q, k, v], 2), torch.ones(DIM)))

    (site,) = sites_of(Video(all_turned), *inputs(1))
    assert site.why.reason is not Reason.OPAQUE


def test_long_attention_that_cannot_be_read_is_no_short_one() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q, k, v) + vendor(q, k, v, 3)

    def to_words(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        words = torch.ones_like(k[:, :7])
        return dense(q, k, v) + vendor(q, words, words, 3)

    given = inputs(1)
    for attend, is_missed in ((both, True), (to_words, False)):
        torch._dynamo.reset()
        options = {"threshold": 0.0, "min_tokens": 100, "inner": "eager", "strict": True}
        compiled = torch.compile(Video(attend).eval(), backend="freqopt", options=options)
        with torch.no_grad(), pytest.raises(SiteError) if is_missed else nullcontext():
            compiled(*given)
