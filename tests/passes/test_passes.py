"""Sites of small graphs: kind, grid, text, and why some stay dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import passes_toys as toys
import pytest
import torch
import torch.nn.functional as F
from passes_toys import (
    DIM,
    HEADS,
    TEXT,
    WIDTH,
    Attention,
    Toy,
    dense,
    heads,
    merged,
    rewritten,
    sites_of,
    text,
    video,
)
from torch import Tensor, fx, nn

from freqopt.errors import SiteError
from freqopt.passes.find import find_sites
from freqopt.passes.naming import readable_path
from freqopt.passes.rewrite.rewrite import replace_site

GRIDS = [(3, 6, 10), (5, 7, 9), (1, 6, 10), (4, 4, 16), (2, 1, 8)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "tokens",
    [
        toys.conv3d_tokens,
        toys.conv2d_tokens,
        toys.linear_tokens,
        toys.einsum_tokens,
        toys.padded_tokens,
    ],
)
def test_grid_is_read_from_whatever_makes_tokens(
    tokens: Any, batch: int, grid: tuple[int, int, int]
) -> None:
    found = sites_of(Toy(tokens), video(grid, batch))
    assert [site.name for site in found] == ["blocks.0", "blocks.1"]
    for site in found:
        assert site.eligible, site.reason
        assert (site.kind, site.heads, site.head_dim) == ("self", HEADS, DIM)
        assert site.query_length == site.key_length == math.prod(grid)
        assert site.grid is not None and math.prod(site.grid) == math.prod(grid)
        # An axis of one entry may leave no trace; the order of the others is what counts.
        assert [e for e in site.grid if e > 1] == [e for e in grid if e > 1]


def test_grid_is_given_in_memory_order() -> None:
    found = sites_of(Toy(toys.time_fastest_tokens), video((3, 6, 10)))
    assert found[0].grid == (6, 10, 3)


def test_tokens_in_tiles_stay_dense() -> None:
    found = sites_of(Toy(toys.tiled_tokens), video((3, 6, 10)))
    assert not found[0].eligible and "tiles" in found[0].reason and found[0].grid is None


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("length", [7, 10, 180])
def test_text_is_told_from_video_by_origin_and_not_by_length(where: str, length: int) -> None:
    found = sites_of(Toy(text=where), video((3, 6, 10)), text(length))
    for site in found:
        assert site.eligible, site.reason
        assert site.kind == "joint" and site.grid == (3, 6, 10)
        expected = (length, 0) if where == "before" else (0, length)
        assert (site.text_before, site.text_after) == expected


class DualStream(nn.Module):
    """Text and video projected apart, joined for attention, taken apart, and joined once more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.video, self.text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.single = Attention()

    def forward(self, video: Tensor, text: Tensor, first: int) -> Tensor:
        x = toys.conv3d_tokens(video, self.weight)
        streams = [y.chunk(3, -1) for y in (self.video(x), self.text(text))]
        q, k, v = (heads(torch.cat(parts, 1)) for parts in zip(*streams, strict=True))
        out = merged(F.scaled_dot_product_attention(q, k, v))
        length = text.shape[1]
        x, text = x + out[:, :-length], text + out[:, -length:]
        # First-frame tokens modulated apart from the others, as in token replacement.
        x = torch.cat([x[:, :first] * 2, x[:, first:] * 3], 1)
        return self.single(torch.cat([x, text], 1))


@pytest.mark.parametrize("first", [60, 13])
@pytest.mark.smoke
def test_dual_stream_then_single_stream(first: int) -> None:
    found = sites_of(DualStream(), video((3, 6, 10)), text(), first)
    assert [site.name for site in found] == ["model", "single"]
    for site in found:
        assert site.eligible, site.reason
        assert (site.kind, site.grid, site.text_after) == ("joint", (3, 6, 10), TEXT)


class InPlaceRope(nn.Module):
    """Rotary positions written into slices of the query after it was made."""

    def __init__(self, attend: Any = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.attend = attend
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, video: Tensor, table: Tensor) -> Tensor:
        x = toys.conv3d_tokens(video, self.weight)
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        q = q.clone()
        out = torch.empty_like(k)
        out[..., 0::2] = k[..., 1::2] * table
        out[..., 1::2] = k[..., 0::2]
        q[:, :, 5:] = q[:, :, 5:] * 3
        return self.attend(q, out, v)


def test_replacement_comes_after_in_place_writes() -> None:
    model, inputs = InPlaceRope(), (video(), torch.randn(DIM // 2))
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(rewritten(model, dense, inputs), expected)


def keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3
    )


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def bhnd_strides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.contiguous().mT.contiguous().mT, v)


@pytest.mark.parametrize("attend", [keyword, grouped, bhnd_strides])
def test_spellings_of_fused_attention(attend: Any) -> None:
    model, inputs = Toy(attend=attend), (video((3, 6, 10), 2),)
    (site, _) = sites_of(model, *inputs)
    assert site.eligible, site.reason
    assert site.kv_heads == (1 if attend is grouped else HEADS)
    assert site.scale == (0.3 if attend is keyword else pytest.approx(DIM**-0.5))
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(rewritten(model, dense, inputs), expected)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def fewer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, :50], v[:, :, :50])


def shifted_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, :-1])


def shifted_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1])


def part_of_the_video(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:])


def additive_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.rand(q.shape[2], q.shape[2]))


def sliding_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    near = (index[:, None] - index[None]).abs() < 20
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def hiding_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = torch.arange(q.shape[2]) < q.shape[2] - 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept[None, None, None])


def wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1))[..., :DIM]


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (causal, "causal"),
        (dropping, "dropout"),
        (fewer_keys, "other tokens than its queries"),
        (shifted_values, "values are of other tokens"),
        (shifted_keys, "other tokens than its queries"),
        (part_of_the_video, "no grid"),
        (additive_mask, "added to the scores"),
        (sliding_mask, "differs between queries"),
        (hiding_mask, "may hide video tokens"),
        (wider_values, "head_dim"),
    ],
)
def test_look_alikes_stay_dense_and_say_why(attend: Any, reason: str) -> None:
    attention = Attention(attend)
    weight = torch.randn(WIDTH, 3, 1, 2, 2)

    def model(x: Tensor) -> Tensor:
        return attention(toys.conv3d_tokens(x, weight))

    (site,) = sites_of(model, video())
    assert not site.eligible and reason in site.reason
    if attend not in (causal, dropping):
        return
    assert site.grid == (3, 6, 10)


def test_cross_attention_is_told_by_origin_even_at_equal_lengths() -> None:
    attention, weight = Attention(), torch.randn(WIDTH, 3, 1, 2, 2)

    def model(x: Tensor, context: Tensor) -> Tensor:
        return attention(toys.conv3d_tokens(x, weight), context)

    (site,) = sites_of(model, video(), text(180))
    assert (site.kind, site.eligible) == ("cross", False)


def test_queries_that_come_ready_made_are_not_called_cross_attention() -> None:
    """A break before the attention gives it a graph of its own, in which nothing is known of it."""

    class Broken(Toy):
        def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
            x = self.tokens(video, self.weight)
            block = self.blocks[0]
            q, k, v = heads(block.q(x)), heads(block.k(x)), heads(block.v(x))
            torch._dynamo.graph_break()
            return merged(block.attend(q, k, v))

    (site,) = sites_of(Broken(), video())
    assert (site.kind, site.eligible) == ("other", False)
    assert "ready-made" in site.reason and "where the break is" in site.reason
    (given,) = sites_of(Broken(), video(), grid=(3, 6, 10))
    assert not given.eligible


@pytest.mark.parametrize("frames", [3, 1])
def test_attention_within_frames_is_no_self_attention_of_the_video(frames: int) -> None:
    attention, weight = Attention(), torch.randn(WIDTH, 3, 1, 2, 2)

    def model(x: Tensor) -> Tensor:
        x = F.conv3d(x, weight, stride=(1, 2, 2)).permute(0, 2, 3, 4, 1)
        b, t, h, w, c = x.shape
        x = attention(x.reshape(b * t, h * w, c)).reshape(b, t, h * w, c)
        return attention(x.transpose(1, 2).reshape(b * h * w, t, c))

    spatial, temporal = sites_of(model, video((frames, 6, 10), 2))
    if frames > 1:
        assert spatial.kind == "other" and "slices" in spatial.reason
    else:  # of one frame it is all there is
        assert (spatial.kind, spatial.eligible, spatial.grid) == ("self", True, (1, 6, 10))
    assert temporal.kind == "other" and not temporal.eligible


def test_text_encoder_has_no_grid() -> None:
    (site,) = sites_of(Attention(), text(50))
    assert (site.kind, site.eligible, site.grid) == ("self", False, None)
    assert "input x" in site.reason


def test_heads_times_head_dim_make_no_grid() -> None:
    project = nn.Linear(WIDTH, WIDTH)

    def model(x: Tensor) -> Tensor:
        q = project(x).unflatten(2, (HEADS, DIM)).flatten(1)[:, None, :, None]
        return F.scaled_dot_product_attention(q, q, q)

    (site,) = sites_of(model, torch.randn(1, 6, WIDTH))
    assert not site.eligible


class History(nn.Module):
    """Two videos in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention(), nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))

    def forward(self, history: Tensor, x: Tensor) -> Tensor:
        parts = [toys.conv3d_tokens(y, self.weight) for y in (history, x)]
        return self.attention(torch.cat(parts, 1))


def test_several_grids_in_one_sequence_stay_dense() -> None:
    (site,) = sites_of(History(), video((3, 6, 10)), video((3, 10, 6)))
    assert not site.eligible and "several grids" in site.reason


def test_the_largest_of_several_grids_is_split_and_the_others_are_exact() -> None:
    (site,) = sites_of(History(), video((2, 3, 5)), video((3, 6, 10)))
    assert site.eligible and "2x3x5" in site.reason and "exact" in site.reason
    assert (site.grid, site.text_before, site.text_after) == ((3, 6, 10), 30, 0)
    (site,) = sites_of(History(), video((3, 6, 10)), video((2, 3, 5)))
    assert (site.grid, site.text_before, site.text_after) == ((3, 6, 10), 0, 30)


class PerFrame(nn.Module):
    """Tokens scaled frame by frame, by what was made of time steps that came in before them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention(), nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        scale = torch.sin(steps)[..., None].transpose(1, 2)
        tokens = toys.conv3d_tokens(x, self.weight)
        frames = tokens.reshape(tokens.shape[0], x.shape[2], -1, WIDTH)
        return self.attention((frames * scale).reshape(tokens.shape))


@pytest.mark.parametrize("grid", [(3, 6, 10), (5, 7, 9)])
def test_a_time_step_per_frame_does_not_take_the_place_of_the_frames(
    grid: tuple[int, int, int],
) -> None:
    """Both have one axis of as many entries: that of the tensor with the others is the video's."""
    (site,) = sites_of(PerFrame(), video(grid, 2), torch.rand(2, 1, grid[0]))
    assert site.eligible, site.reason
    assert (site.kind, site.grid) == ("self", grid)


def test_an_unknown_reordering_loses_the_grid() -> None:
    attention, weight = Attention(), torch.randn(WIDTH, 3, 1, 2, 2)

    def model(x: Tensor, order: Tensor) -> Tensor:
        return attention(toys.conv3d_tokens(x, weight)[:, order])

    order = torch.randperm(180)
    (site,) = sites_of(model, video(), order)
    assert (site.kind, site.eligible, site.grid) == ("self", False, None)
    (site,) = sites_of(model, video(), order, grid=(3, 6, 10))
    assert (site.eligible, site.grid) == (True, (3, 6, 10))


def test_packed_tokens_need_the_users_grid_and_it_has_to_fit() -> None:
    model, packed = Attention(), text(180)
    (site,) = sites_of(model, packed, grid=(3, 6, 10))
    assert site.eligible and site.grid == (3, 6, 10)
    (site,) = sites_of(model, packed, grid=(3, 6, 11))
    assert not site.eligible and "grid=(3, 6, 11)" in site.reason and "198" in site.reason


def test_users_grid_goes_before_the_graphs_and_finds_the_video_beside_text() -> None:
    found = sites_of(Toy(text="after"), video((3, 6, 10)), text(), grid=(6, 3, 10))
    assert found[0].grid == (6, 3, 10) and found[0].text_after == TEXT
    found = sites_of(Toy(text="after"), video((3, 6, 10)), text(), grid=(7, 1, 1))
    assert found[0].eligible and (found[0].text_before, found[0].text_after) == (180, 0)


@pytest.mark.parametrize("where", ["before", "after"])
def test_symbolic_sizes_reach_the_replacement(where: str) -> None:
    calls = []

    def target(q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any) -> Tensor:
        calls.append(rest[:3])
        return dense(q, k, v, mask, *rest)

    graphs = 0

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        for site in find_sites(gm):
            replace_site(gm, site, target)
        gm.recompile()
        return gm.forward

    model = Toy(text=where)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for grid, length in (((5, 6, 10), 7), ((6, 7, 9), 11), ((9, 8, 4), 13)):
            inputs = video(grid, 2), text(length, 2)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
            sides = (length, 0) if where == "before" else (0, length)
            assert calls[-1] == (grid, *sides)
    assert graphs == 1


def test_export_graphs_are_read_the_same_way() -> None:
    model = Toy(text="before").eval()
    program = torch.export.export(model, (video((3, 6, 10), 2), text(batch=2)))
    found = find_sites(program.graph_module)
    assert [site.name for site in found] == ["blocks.0", "blocks.1"]
    for site in found:
        assert site.eligible, site.reason
        assert (site.kind, site.grid, site.text_before) == ("joint", (3, 6, 10), TEXT)


def test_autocast_is_followed() -> None:
    seen = []

    def target(q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        return dense(q, k, v, mask, *rest)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, video: Tensor) -> Tensor:
            x = toys.conv3d_tokens(video, self.weight)
            q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
            return F.scaled_dot_product_attention(F.layer_norm(q.float(), (DIM,)), k.float(), v)

    model, inputs = Normed(), (video(),)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)
        got = rewritten(model, target, inputs)
    assert seen == [(torch.bfloat16,) * 3]
    assert expected.dtype == got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


def test_second_attention_in_a_module_has_its_own_name() -> None:
    attention, weight = Attention(), torch.randn(WIDTH, 3, 1, 2, 2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(toys.conv3d_tokens(x, weight)))

    assert [site.name for site in sites_of(Twice(), video())] == ["inner", "inner@1"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']", ""),
        ("L['self'].blocks[0].attn1", "blocks.0.attn1"),
        ("L['self'].__dict__['_modules']['blocks']._modules['3'].attn1", "blocks.3.attn1"),
        ("L['self']._modules['blocks']._modules['10']._modules['attn']", "blocks.10.attn"),
        ("L['model']._orig_mod.layers[2]", "layers.2"),
        ("blocks.3.attn1", "blocks.3.attn1"),
    ],
)
def test_names_are_paths_in_the_model(path: str, expected: str) -> None:
    assert readable_path(path) == expected


def test_a_site_that_is_not_eligible_cannot_be_replaced() -> None:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        (site,) = find_sites(gm)
        with pytest.raises(SiteError, match="causal"):
            replace_site(gm, site, dense)
        return gm.forward

    torch.compile(Attention(causal), backend=backend)(text())
