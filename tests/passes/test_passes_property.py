"""Random small transformers, in the many ways people write them: each is found and rewritten.

The choices are independent, so combinations that no public model has are tried too; at threshold 0
the compiled model must equal the eager one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.rewrite import insert_split
from freqopt.passes.site import Site
from freqopt.passes.spellings.packed import packed_opened

HEADS, DIM = 2, 8
WIDTH = HEADS * DIM


@dataclass(frozen=True)
class Style:
    """How one transformer is written."""

    grid: tuple[int, int, int]
    batch: int
    patchify: str
    projection: str
    heads: str
    rotary: str
    text: str
    streams: str
    normalise: bool
    attention: str


STYLES = st.builds(
    Style,
    grid=st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(2, 7)),
    batch=st.integers(1, 2),
    patchify=st.sampled_from(["conv3d", "conv2d", "linear", "loop", "unfold"]),
    projection=st.sampled_from(["fused", "separate", "chunked"]),
    heads=st.sampled_from(["view", "unflatten", "reshape"]),
    rotary=st.sampled_from(["none", "halves", "in_place", "complex"]),
    text=st.sampled_from(["none", "before", "after", "keys"]),
    streams=st.sampled_from(["single", "dual"]),
    normalise=st.booleans(),
    attention=st.sampled_from(
        ["sdpa", "keywords", "matmul", "einsum", "tokens_first", "float_softmax", "by_hand"]
    ),
)


class Layer(nn.Module):
    """One attention layer in a style; text and video are projected together or apart."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.video = nn.Linear(WIDTH, 3 * WIDTH)
        self.text = nn.Linear(WIDTH, 3 * WIDTH)
        self.apart = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor, fused: nn.Linear) -> list[Tensor]:
        style = self.style
        if style.projection == "separate":
            parts = [linear(x) for linear in self.apart]
        elif style.projection == "chunked":
            parts = list(fused(x).chunk(3, dim=-1))
        else:
            b, n, _ = x.shape
            stacked = fused(x).reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
            return list(stacked.unbind(0))
        if style.heads == "view":
            return [y.view(y.shape[0], -1, HEADS, DIM).transpose(1, 2) for y in parts]
        if style.heads == "unflatten":
            return [y.unflatten(2, (HEADS, -1)).permute(0, 2, 1, 3) for y in parts]
        return [y.reshape(*y.shape[:2], HEADS, DIM).swapaxes(1, 2) for y in parts]

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        """Rotary positions of (B, H, N, D) from (N, D / 2) angles."""
        cos, sin = table.cos(), table.sin()
        if self.style.rotary == "halves":
            first, second = x.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        if self.style.rotary == "in_place":
            out = torch.empty_like(x)
            out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
            out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
            return out.type_as(x)
        if self.style.rotary == "complex":
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(table), table)).flatten(3)
        return x

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        name, scale = self.style.attention, DIM**-0.5
        if name == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if name == "keywords":
            return F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3)
        if name == "matmul":
            return ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
        if name == "einsum":
            weights = F.softmax(torch.einsum("bhid,bhjd->bhij", q * scale, k), dim=-1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if name == "tokens_first":
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
            weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(scale).softmax(-1)
            return torch.einsum("bhqk,bkhd->bqhd", weights, value).transpose(1, 2)
        if name == "by_hand":
            weights = (q @ k.mT * scale).exp()
            return (weights / weights.sum(-1, keepdim=True)) @ v
        weights = F.softmax((q / 2) @ (k / 2).mT, dim=-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v

    def forward(self, video: Tensor, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        style, length = self.style, text.shape[1]
        first = style.text == "before"

        def joined(a: Tensor, b: Tensor, dim: int) -> Tensor:
            return torch.cat([b, a] if first else [a, b], dim)

        if style.text == "none":
            q, k, v = self.project(video, self.video)
        elif style.text == "keys":
            q, k, v = self.project(video, self.video)
            theirs = self.project(text, self.text)
        elif style.streams == "dual":
            ours, theirs = self.project(video, self.video), self.project(text, self.text)
            q, k, v = (joined(a, b, 2) for a, b in zip(ours, theirs, strict=True))
        else:
            q, k, v = self.project(joined(video, text, 1), self.video)
        if style.normalise:
            q, k = self.norm(q), self.norm(k)
        if style.rotary != "none":
            if style.text in ("before", "after"):
                table = joined(table, torch.zeros(length, DIM // 2), 0)
            q, k = self.turn(q, table), self.turn(k, table)
        if style.text == "keys":
            k, v = joined(k, theirs[1], 2), joined(v, theirs[2], 2)
        out = self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))
        if style.text in ("none", "keys"):
            return video + out, text
        if first:
            return video + out[:, length:], text + out[:, :length]
        return video + out[:, : video.shape[1]], text + out[:, video.shape[1] :]


class Transformer(nn.Module):
    """Patchify, two layers, and out."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.conv3d = nn.Conv3d(3, WIDTH, (1, 2, 2), stride=(1, 2, 2))
        self.conv2d = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.linear = nn.Linear(12, WIDTH)
        self.layers = nn.ModuleList(Layer(style) for _ in range(2))

    def patches(self, video: Tensor) -> Tensor:
        b, c, t, h, w = video.shape
        if self.style.patchify == "conv3d":
            return self.conv3d(video).flatten(2).transpose(1, 2)
        if self.style.patchify == "conv2d":
            frames = self.conv2d(video.transpose(1, 2).reshape(b * t, c, h, w))
            return frames.view(b, t, WIDTH, h // 2, w // 2).permute(0, 1, 3, 4, 2).flatten(1, 3)
        if self.style.patchify == "loop":
            images = [self.conv2d(frame).flatten(2) for frame in video.unbind(2)]
            return torch.cat(images, 2).transpose(1, 2)
        if self.style.patchify == "unfold":
            cut = video.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6)
            return self.linear(cut.flatten(4).flatten(1, 3))
        cut = video.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        return self.linear(cut.flatten(4).flatten(1, 3))

    def forward(self, video: Tensor, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(video)
        for layer in self.layers:
            x, text = layer(x, text, table)
        return x, text


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(style=STYLES)
def test_any_way_of_writing_a_transformer_is_found_and_rewritten(style: Style) -> None:
    torch.manual_seed(0)
    model = Transformer(style).eval()
    t, h, w = style.grid
    length = 2 if style.text == "keys" else 5  # more than half of the video would stay dense
    video = torch.randn(style.batch, 3, t, 2 * h, 2 * w)
    text = torch.randn(style.batch, length, WIDTH)
    table = torch.randn(t * h * w, DIM // 2)
    found: list[Site] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with packed_opened(gm):
            sites = find_sites(gm)
            found.extend(sites)
            for site in sites:
                if site.eligible:
                    zero = torch.zeros(2, site.heads)
                    insert_split(gm, site, zero, density=0.0, probes=0)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(video, text, table)
        out = torch.compile(model, backend=backend, fullgraph=True)(video, text, table)
    for got, want in zip(out, expected, strict=True):
        assert torch.allclose(got, want, atol=1e-4), style
    around = {"none": (0, 0), "before": (length, 0)}.get(style.text, (0, length))
    kind = {"none": "self", "keys": "text in keys"}.get(style.text, "joint")
    for site in found:
        assert site.eligible, (style, site.reason)
        assert (site.kind, site.text_before, site.text_after) == (kind, *around), style
        assert site.grid == style.grid, style
    assert len(found) == 2
