"""Grids from whatever makes tokens of frames: loops, a first frame given, pooling, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import (
    WIDTH,
    Attention,
    Toy,
    conv3d_tokens,
    dense,
    rewritten,
    sites_of,
    text,
    video,
)
from torch import Tensor, nn

GRID = (3, 6, 10)


def frames_in_a_loop(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([conv3d_tokens(x[:, :, i : i + 1], weight) for i in range(x.shape[2])], 1)


def frames_stacked(x: Tensor, weight: Tensor) -> Tensor:
    frames = [F.conv2d(x[:, :, i], weight[:, :, 0], stride=2) for i in range(x.shape[2])]
    return torch.stack(frames, 2).flatten(2).transpose(1, 2)


def frames_unbound(x: Tensor, weight: Tensor) -> Tensor:
    frames = [F.conv2d(frame, weight[:, :, 0], stride=2) for frame in x.unbind(2)]
    return torch.stack(frames, 1).transpose(1, 2).flatten(2).transpose(1, 2)


def pooled(x: Tensor, weight: Tensor) -> Tensor:
    wide = F.interpolate(x, scale_factor=(1, 2, 2))
    return conv3d_tokens(F.avg_pool3d(wide, (1, 2, 2)), weight)


def unshuffled(x: Tensor, weight: Tensor) -> Tensor:
    pixels = F.pixel_unshuffle(x.transpose(1, 2), 2).permute(0, 1, 3, 4, 2)
    return F.linear(pixels.flatten(1, 3), weight.flatten(1))


def windows(x: Tensor, weight: Tensor) -> Tensor:
    patches = x.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6)
    return F.linear(patches.flatten(4).flatten(1, 3), weight.flatten(1))


def blocks(x: Tensor, weight: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    columns = F.unfold(x.transpose(1, 2).reshape(b * t, c, h, w), 2, stride=2)
    return F.linear(columns.transpose(1, 2).reshape(b, -1, 12), weight.flatten(1))


def four_merged(x: Tensor, weight: Tensor) -> Tensor:
    pieces = [x[:, :, :, i::2, j::2] for i in range(2) for j in range(2)]
    return F.linear(torch.cat(pieces, 1).flatten(2).transpose(1, 2), weight.flatten(1))


def flipped(x: Tensor, weight: Tensor) -> Tensor:
    return conv3d_tokens(x, weight).flip(1)


@pytest.mark.parametrize(
    "tokens",
    [
        frames_in_a_loop,
        frames_stacked,
        frames_unbound,
        pooled,
        unshuffled,
        windows,
        blocks,
        four_merged,
        flipped,
    ],
)
def test_grid_is_read_however_frames_become_tokens(tokens: Callable[..., Tensor]) -> None:
    for site in sites_of(Toy(tokens), video((5, 7, 9), 2)):
        assert site.eligible, site.reason
        assert (site.kind, site.grid) == ("self", (5, 7, 9))


def frames_backwards(x: Tensor, weight: Tensor) -> Tensor:
    frames = [F.conv2d(x[:, :, 2 - i], weight[:, :, 0], stride=2) for i in range(3)]
    return torch.stack(frames, 2).flatten(2).transpose(1, 2)


def rolled(x: Tensor, weight: Tensor) -> Tensor:
    return conv3d_tokens(x, weight).roll(5, 1)


@pytest.mark.parametrize("tokens", [frames_backwards, rolled])
def test_other_orders_are_not_taken_for_a_grid(tokens: Callable[..., Tensor]) -> None:
    for site in sites_of(Toy(tokens), video(GRID, 2)):
        assert not site.eligible and site.grid is None


class FirstFrame(nn.Module):
    """A given first frame before the rest of the video, then patches by convolution or linear."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear, self.attention = linear, Attention()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))

    def forward(self, first: Tensor, rest: Tensor, scale: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([first, rest], 2)
        if self.linear:
            b, c, t, h, w = x.shape
            x = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
            x = F.linear(x, self.weight.flatten(1)).flatten(1, 3)
            x = (x.view(b, t, -1, WIDTH) * scale[:, :, None]).flatten(1, 2)
        else:
            x = conv3d_tokens(x, self.weight)
        return self.attention(torch.cat([x, text], 1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_a_first_frame_is_one_of_the_video(linear: bool, dynamic: bool) -> None:
    model = FirstFrame(linear)
    inputs = (video((1, 6, 10), 2), video((4, 6, 10), 2), torch.randn(2, 5, WIDTH), text(batch=2))
    (site,) = sites_of(model, *inputs)
    assert site.eligible, site.reason
    assert (site.kind, site.grid, site.text_after) == ("joint", (5, 6, 10), 7)
    with torch.no_grad():
        expected = model(*inputs)
    got = rewritten(model, dense, inputs, dynamic=dynamic)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class History(nn.Module):
    """Two videos in one sequence, with text before them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention(), nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))

    def forward(self, history: Tensor, x: Tensor, text: Tensor) -> Tensor:
        parts = [conv3d_tokens(y, self.weight) for y in (history, x)]
        return self.attention(torch.cat([text, *parts], 1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("frames", [(1, 1), (2, 5), (4, 3)])
def test_videos_with_the_same_rows_and_columns_are_one(
    frames: tuple[int, int], dynamic: bool
) -> None:
    """An image and the one it is an edit of; history frames of the same size."""
    model, total = History(), sum(frames)
    inputs = (*(video((count, 6, 10), 2) for count in frames), text(batch=2))
    for given in (None, (total, 6, 10)):
        (site,) = sites_of(model, *inputs, grid=given)
        assert site.eligible, site.reason
        assert (site.grid, site.text_before, site.text_after) == ((total, 6, 10), 7, 0)
    seen: list[Any] = []

    def target(q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any) -> Tensor:
        seen.append(rest[0])
        return dense(q, k, v, mask, *rest)

    with torch.no_grad():
        expected = model(*inputs)
    got = rewritten(model, target, inputs, dynamic=dynamic)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert seen == [(total, 6, 10)]


class Table(Toy):
    """Rotary angles that are a plain attribute of the module, with axes like the tokens' own."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = torch.randn(2, 180, WIDTH)

    def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.tokens(video, self.weight) * self.angles.cos()
        return self.blocks[0](x)


def test_tables_kept_with_a_module_are_no_data() -> None:
    (site,) = sites_of(Table(), video(GRID, 2))
    assert site.eligible, site.reason
    assert site.grid == GRID


class Filled(nn.Module):
    """Tokens of the video filled up to a multiple of 64 before the text comes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention(), nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = conv3d_tokens(x, self.weight)
        filled = F.pad(tokens, (0, 0, 0, -tokens.shape[1] % 64))
        return self.attention(torch.cat([filled, text], 1))


def test_tokens_that_fill_up_a_video_stay_exact() -> None:
    (site,) = sites_of(Filled(), video(GRID, 2), text(batch=2))
    assert site.eligible, site.reason
    assert (site.grid, site.text_before, site.text_after) == (GRID, 0, 12 + 7)
