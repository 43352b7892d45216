"""Small models for the tests of the passes: ways to make tokens, to attend, and to look like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.rewrite import replace_site
from freqopt.passes.site import Site
from freqopt.passes.spellings.packed import packed_opened

HEADS, DIM = 2, 8
WIDTH = HEADS * DIM
TEXT = 7
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """(B, N, C) as (B, H, N, D)."""
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections around `attend`; of `context` too, if there is one."""

    def __init__(self, attend: Attend = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = heads(self.q(x)), heads(self.k(source)), heads(self.v(source))
        return merged(self.attend(q, k, v))


def conv3d_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """(B, C, T, H, W) as (B, N, width) with patches of 1 x 2 x 2."""
    return F.conv3d(video, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)


def conv2d_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """The same, one frame at a time."""
    batch, _, frames = video.shape[:3]
    images = video.transpose(1, 2).flatten(0, 1)
    x = F.conv2d(images, weight[:, :, 0], stride=2)
    x = x.flatten(2).transpose(1, 2)
    return x.reshape(batch, frames, *x.shape[1:]).flatten(1, 2)


def linear_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """The same, as a linear layer on rearranged patches."""
    b, c, t, h, w = video.shape
    x = video.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return F.linear(x.flatten(4), weight.flatten(1)).flatten(1, 3)


def einsum_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """The same, as one contraction."""
    b, c, t, h, w = video.shape
    x = video.reshape(b, c, t, h // 2, 2, w // 2, 2)
    return torch.einsum("bcthpwq,dcpq->bthwd", x, weight[:, :, 0]).reshape(b, -1, WIDTH)


def padded_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """Of a video whose height lacks a row, which is padded."""
    return conv3d_tokens(F.pad(video[:, :, :, 1:], (0, 0, 1, 0)), weight)


def time_fastest_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """Tokens with neighbouring frames next to each other in memory."""
    x = F.conv3d(video, weight, stride=(1, 2, 2))
    return x.permute(0, 3, 4, 2, 1).flatten(1, 3)


def tiled_tokens(video: Tensor, weight: Tensor) -> Tensor:
    """Tokens tile by tile of 1 x 2 x 2, which is not raster order."""
    x = F.conv3d(video, weight, stride=(1, 2, 2))
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
    return x.flatten(1, 5)


class Toy(nn.Module):
    """A video made into tokens, two attentions over them, with text or without.

    text: "none", "before" or "after" (one stream: joined before the projections).
    """

    def __init__(
        self,
        tokens: Callable[[Tensor, Tensor], Tensor] = conv3d_tokens,
        attend: Attend = F.scaled_dot_product_attention,
        text: str = "none",
    ) -> None:
        super().__init__()
        self.tokens, self.text = tokens, text
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.blocks = nn.ModuleList(Attention(attend) for _ in range(2))

    def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.tokens(video, self.weight)
        if text is not None and self.text != "none":
            x = torch.cat([text, x] if self.text == "before" else [x, text], 1)
        for block in self.blocks:
            x = x + block(x)
        return x


def video(grid: tuple[int, int, int] = (3, 6, 10), batch: int = 1) -> Tensor:
    """A video whose tokens lie on `grid`."""
    t, h, w = grid
    return torch.randn(batch, 3, t, 2 * h, 2 * w)


def text(length: int = TEXT, batch: int = 1) -> Tensor:
    """Embedded text, (B, L, C)."""
    return torch.randn(batch, length, WIDTH)


def sites_of(
    model: nn.Module | Callable[..., Any],
    *inputs: Any,
    grid: tuple[int, int, int] | None = None,
    dynamic: bool = False,
    **named: Any,
) -> list[Site]:
    """Sites of all graphs that a model is captured in."""
    found: list[Site] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with packed_opened(gm):
            found.extend(find_sites(gm, grid=grid))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=look, dynamic=dynamic)(*inputs, **named)
    return found


def rewritten(
    model: nn.Module, target: Callable[..., Any], inputs: Sequence[Any], **options: Any
) -> Any:
    """The output of a model with `target` in place of every eligible attention."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with packed_opened(gm):
            sites = [site for site in find_sites(gm) if site.eligible]
            assert sites
            for site in sites:
                replace_site(gm, site, target)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, **options)(*inputs)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    """Dense attention in the place of a split, checking what it is told about its tokens."""
    allowed = None if mask is None else mask[:, None, None]
    grid, before, after, scale = rest
    assert math.prod(grid) + before + after == q.shape[2]
    assert q.dim() == k.dim() == v.dim() == 4 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
