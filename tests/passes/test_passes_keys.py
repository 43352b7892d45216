"""Text, registers or history in the keys only: the queries that are missing are filled up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import (
    DIM,
    HEADS,
    TEXT,
    WIDTH,
    conv3d_tokens,
    dense,
    heads,
    merged,
    rewritten,
    sites_of,
    text,
    video,
)
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.passes.reasons import Reason

GRID = (3, 6, 10)


class TextInKeys(nn.Module):
    """Queries of the video; keys and values of the text, which is before or after it or both."""

    def __init__(self, where: str = "after", masked: bool = False, groups: bool = False) -> None:
        super().__init__()
        self.where, self.masked = where, masked
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.q = nn.Linear(WIDTH, WIDTH)
        self.count = 1 if groups else HEADS
        self.kv, self.context = (nn.Linear(WIDTH, 2 * self.count * DIM) for _ in range(2))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = conv3d_tokens(video, self.weight)
        pairs = [
            [heads(y, self.count) for y in projected.chunk(2, -1)]
            for projected in (self.kv(x), self.context(text))
        ]
        order = {"before": (1, 0), "after": (0, 1), "both": (1, 0, 1)}[self.where]
        k, v = (torch.cat([pairs[i][which] for i in order], 2) for which in range(2))
        mask = None
        if self.masked:
            parts = (torch.ones(x.shape[:2], dtype=torch.bool), text[..., 0] > 0)
            mask = torch.cat([parts[i] for i in order], 1)[:, None, None]
        q = heads(self.q(x))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=self.count != HEADS
        )
        return out.transpose(1, 2).contiguous().view(x.shape)


AROUND = {"before": (TEXT, 0), "after": (0, TEXT), "both": (TEXT, TEXT)}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_text_in_the_keys_is_split(where: str, masked: bool, dynamic: bool) -> None:
    model, inputs = TextInKeys(where, masked), (video(GRID, 2), text(batch=2))
    (site,) = sites_of(model, *inputs)
    assert site.eligible, site.reason
    assert (site.kind, site.grid) == ("text in keys", GRID)
    assert (site.text_before, site.text_after) == AROUND[where]
    assert (site.query_length, site.key_length) == (180, 180 + sum(AROUND[where]))
    with torch.no_grad():
        expected = model(*inputs)
    got = rewritten(model, dense, inputs, dynamic=dynamic)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"groups": True}])
def test_the_op_in_its_place_is_exact_and_has_its_gradients(options: Any, inner: str) -> None:
    model, inputs = TextInKeys(**options), (video(GRID, 2), text(batch=2))
    given = {"threshold": 0.0, "min_tokens": 0, "strict": True, "inner": inner}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=freqopt_backend, options=given, fullgraph=True)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(*inputs)
        out.square().sum().backward()
        found.append((out.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in found[0][1])
    for mine, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest)


def test_autocast_in_half_precision() -> None:
    model, inputs = TextInKeys(masked=True), (video(GRID), text())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)
        got = rewritten(model, dense, inputs)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class TurnedByTable(nn.Module):
    """A block of PRX: text in the keys, positions in a table with as many axes as the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.context = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor, table: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        other, values = (heads(y) for y in self.context(text).chunk(2, -1))
        k, v = torch.cat([other, self._turned(k, table)], 2), torch.cat([values, v], 2)
        return merged(F.scaled_dot_product_attention(self._turned(q, table), k, v))

    def _turned(self, y: Tensor, table: Tensor) -> Tensor:
        """table: (1, 1, N, D / 2, 2, 2), which comes first in the products."""
        pairs = y.reshape(*y.shape[:-1], -1, 1, 2)
        return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).reshape(y.shape)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_table_of_the_call_is_not_what_the_tokens_are(batch: int, rows: int) -> None:
    """Queries and keys meet it, values do not: all three are of the tokens that came in first."""
    rows = min(rows, batch)
    model, (t, h, w) = TurnedByTable(), GRID
    table = torch.randn(rows, 1, t * h * w, DIM // 2, 2, 2)
    inputs = torch.randn(batch, t * h * w, WIDTH), text(batch=batch), table
    (site,) = sites_of(model, *inputs, grid=GRID)
    assert site.eligible, site.reason
    assert (site.kind, site.grid, site.text_before) == ("text in keys", GRID, TEXT)
    with torch.no_grad():
        expected = model(*inputs)
    torch._dynamo.reset()
    given = {"threshold": 0.0, "grid": GRID, "min_tokens": 0, "strict": True, "inner": "eager"}
    with torch.no_grad():
        got = torch.compile(model, backend=freqopt_backend, options=given)(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Registers(nn.Module):
    """Learned keys and values in front of the video's; heads folded into the batch, or not."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded, self.weight = folded, nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.extra = nn.Parameter(torch.randn(1, HEADS, 4, DIM))

    def forward(self, video: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in self.qkv(conv3d_tokens(video, self.weight)).chunk(3, -1))
        extra = self.extra.expand(video.shape[0], -1, -1, -1)
        k, v = (torch.cat([extra, y], 2) for y in (k, v))
        if not self.folded:
            return merged(F.scaled_dot_product_attention(q, k, v))
        q, k, v = (y.reshape(-1, y.shape[2], DIM) for y in (q, k, v))
        out = (torch.bmm(q, k.mT) * DIM**-0.5).softmax(-1).bmm(v)
        return merged(out.view(video.shape[0], HEADS, -1, DIM))


@pytest.mark.parametrize("folded", [False, True])
def test_registers_in_the_keys(folded: bool) -> None:
    model, inputs = Registers(folded), (video(GRID, 2),)
    (site,) = sites_of(model, *inputs)
    assert site.eligible, site.reason
    assert (site.kind, site.grid, site.text_before) == ("text in keys", GRID, 4)
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(rewritten(model, dense, inputs), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_filled_up_stays_dense() -> None:
    """Too many other keys, keys that hold the queries twice, queries that are not the video."""
    (site,) = sites_of(TextInKeys(), video(GRID), text(100))
    assert not site.eligible and "100 tokens more" in site.reason

    class Twice(TextInKeys):
        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            q = heads(self.q(conv3d_tokens(video, self.weight)))
            k = torch.cat([q, q], 2)
            return F.scaled_dot_product_attention(q, k, k)

    (site,) = sites_of(Twice(), video(GRID), text())
    assert not site.eligible and "other tokens" in site.reason

    class OfText(TextInKeys):
        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            q, x = heads(self.q(text)), heads(self.q(conv3d_tokens(video, self.weight)))
            k = torch.cat([q, x], 2)
            return F.scaled_dot_product_attention(q, k, k)

    (site,) = sites_of(OfText(), video(GRID), text())
    assert (site.kind, site.eligible) == ("other", False)


class Placed(nn.Module):
    """Text and video written into one sequence by index, as packed models do."""

    def __init__(self, copies: bool, spare: int = 0) -> None:
        super().__init__()
        self.copies, self.spare = copies, spare
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor, text: Tensor, at: Tensor, text_at: Tensor) -> Tensor:
        count = tokens.shape[1] + text.shape[1] + self.spare
        x = tokens.new_zeros(tokens.shape[0], count, WIDTH)
        if self.copies:
            x = x.index_copy(1, text_at, text).index_copy(1, at, tokens)
        else:
            x[:, text_at] = text
            x[:, at] = tokens
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        return merged(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("copies", [False, True])
def test_tokens_put_in_place_by_index_are_split_with_a_grid_only(copies: bool) -> None:
    index = torch.arange(187)
    inputs = (torch.randn(2, 180, WIDTH), text(batch=2), index[7:], index[:7])
    (site,) = sites_of(Placed(copies), *inputs, grid=GRID)
    assert not site.eligible and site.why.reason is Reason.PLACED, "no graph shows their order"
    seen = freqopt.inspect(Placed(copies), *inputs, min_tokens=0).sites
    assert not seen[0].eligible
    (found,) = freqopt.inspect(Placed(copies), *inputs, min_tokens=0, grid=GRID).sites
    assert found.eligible and (found.kind, found.text_before, found.text_after) == ("joint", 7, 0)
    spare = Placed(copies, spare=1)
    (found,) = freqopt.inspect(spare, *inputs, min_tokens=0, grid=GRID).sites
    assert not found.eligible, "pieces that do not fill the sequence tell nothing"


@pytest.mark.parametrize("copies", [False, True])
def test_the_order_of_tokens_put_in_place_is_read_at_every_call(copies: bool) -> None:
    index, model = torch.arange(187), Placed(copies).eval()
    tokens, words = torch.randn(2, 180, WIDTH), text(batch=2)
    in_order = (index[7:], index[:7])
    around = (index[6:186], torch.cat([index[:6], index[186:]]))
    options = {"threshold": 30.0, "min_tokens": 0, "inner": "eager", "grid": GRID}
    (site,) = freqopt.inspect(model, tokens, words, *around, min_tokens=0, grid=GRID).sites
    assert not site.eligible and "by index" in site.reason
    torch._dynamo.reset()
    split = torch.compile(model, backend="freqopt", options=options)
    with torch.no_grad():
        expected = model(tokens, words, *in_order)
        assert (split(tokens, words, *in_order) - expected).norm() > 1e-3 * expected.norm()
        moved = split(tokens, words, *around)
        torch.testing.assert_close(moved, model(tokens, words, *around), rtol=1e-4, atol=1e-5)


class Chunk(nn.Module):
    """A chunk of a video, whose keys are written behind those of the chunks before it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, frames: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = conv3d_tokens(frames, self.weight)
        q, k, v = (heads(f(x)) for f in (self.q, self.k, self.v))
        held = self.held(keys, k), self.held(values, v)
        return merged(F.scaled_dot_product_attention(q, *held))

    def held(self, cache: Tensor, new: Tensor) -> Tensor:
        count, at = new.shape[2], cache.shape[2] - new.shape[2]
        if self.how == "index_copy":
            return cache.index_copy(2, torch.arange(at, at + count), new)
        if self.how == "slice_scatter":
            return torch.slice_scatter(cache, new, 2, at, at + count)
        if self.how == "roll":
            return torch.cat([cache.roll(-count, 2)[:, :, :at], new], 2)
        return torch.cat([cache, new], 2)


@pytest.mark.parametrize("how", ["index_copy", "slice_scatter", "roll", "cat"])
def test_keys_behind_those_of_a_cache_are_called_a_cache(how: str) -> None:
    frames = video(GRID)
    cache = torch.randn(frames.shape[0], HEADS, 2 * 180, DIM)
    (site,) = sites_of(Chunk(how).eval(), frames, cache, cache.clone())
    assert (site.kind, site.why.reason) == ("cross", Reason.CACHE)
