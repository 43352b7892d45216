"""`nn.MultiheadAttention` and FlexAttention: split where they are plain attention, else left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import passes_toys as toys
import pytest
import torch
from passes_toys import WIDTH, sites_of, video
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import freqopt
from freqopt.backend import freqopt_backend

GRID, HEADS, TEXT = (3, 6, 10), 2, 7
Attend = Callable[[nn.MultiheadAttention, Tensor], Tensor]


def plain(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


def unused_weights(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x, x, x)[0]


def text_padding(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Of the text behind the video, all but two tokens are padding."""
    padding = torch.arange(x.shape[1]) >= x.shape[1] - TEXT + 2
    return attention(x, x, x, key_padding_mask=padding.expand(x.shape[0], -1))[0]


class Model(nn.Module):
    """Two blocks of `nn.MultiheadAttention` over video, or video and text behind it."""

    def __init__(self, attend: Attend = plain, **options: Any) -> None:
        super().__init__()
        self.attend = attend
        self.first = options.get("batch_first", True)
        options = {"batch_first": True, **options}
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2) / 4)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, **options) for _ in "ab")
        for parameter in self.blocks.parameters():
            nn.init.normal_(parameter, std=0.25)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        tokens = toys.conv3d_tokens(x, self.weight)
        if text is not None:
            tokens = torch.cat([tokens, text], 1)
        if not self.first:
            tokens = tokens.transpose(0, 1)
        for block in self.blocks:
            tokens = tokens + self.attend(block, tokens)
        return tokens


class Graph:
    """An inner backend that keeps the graph it is given and runs it as it is."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.targets = [str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes]
        return gm.forward

    def count(self, name: str) -> int:
        return sum(name in target for target in self.targets)


def run(model: nn.Module, *inputs: Tensor, threshold: float = 0.0, **options: Any) -> Any:
    """The compiled model's output, the eager one's, and the graph."""
    graph = Graph()
    given = {"threshold": threshold, "min_tokens": 1, "inner": graph, **options}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=freqopt_backend, dynamic=False, options=given)
        return compiled(*inputs), model(*inputs), graph


@pytest.mark.parametrize(
    ("attend", "options"),
    [
        (plain, {}),
        (plain, {"batch_first": False}),
        (plain, {"bias": False}),
        (plain, {"kdim": WIDTH, "vdim": WIDTH}),
        (unused_weights, {}),
    ],
)
@pytest.mark.parametrize(("grid", "batch"), [((5, 7, 9), 2), ((1, 18, 10), 1)])
def test_multihead_attention_is_split(
    attend: Attend, options: dict[str, Any], grid: tuple[int, int, int], batch: int
) -> None:
    model = Model(attend, **options).eval()
    out, expected, graph = run(model, video(grid, batch), strict=True)
    assert (graph.count("split_attention"), graph.count("multi_head")) == (2, 0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    coarse, _, _ = run(model, video(grid, batch), threshold=1e9)
    assert not torch.allclose(coarse, expected, rtol=1e-3, atol=1e-3)


def test_its_padding_of_text_is_honoured() -> None:
    model = Model(text_padding).eval()
    inputs = video((5, 7, 9), 2), torch.randn(2, TEXT, WIDTH)
    out, expected, graph = run(model, *inputs, strict=True)
    assert graph.count("split_attention") == 2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    unpadded, _, _ = run(Model(plain).eval(), *inputs)
    assert not torch.allclose(unpadded, expected)


def masked(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def used_weights(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    out, weights = attention(x, x, x)
    return out + weights.mean()


def video_padding(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    padding = torch.arange(x.shape[1]) >= x.shape[1] - 2
    return attention(x, x, x, key_padding_mask=padding.expand(x.shape[0], -1))[0]


def float_padding(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x, x, x, key_padding_mask=torch.zeros(x.shape[:2]))[0]


def of_text(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    other = torch.ones(x.shape[0], 5, x.shape[2])
    return attention(x, other, other)[0]


@pytest.mark.parametrize(
    ("attend", "options", "said"),
    [
        (masked, {}, "attn_mask"),
        (used_weights, {}, "need_weights=False"),
        (video_padding, {}, "may hide video"),
        (float_padding, {}, "key_padding_mask"),
        (of_text, {}, "of different tokens"),
        (plain, {"add_zero_attn": True}, "add_zero_attn"),
        (plain, {"add_bias_kv": True}, "add_bias_kv"),
    ],
)
def test_what_it_does_besides_leaves_it_the_node_it_was(
    attend: Attend, options: dict[str, Any], said: str
) -> None:
    model = Model(attend, **options).eval()
    out, expected, graph = run(model, video(GRID))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert graph.count("multi_head") == 2
    assert graph.count("split_attention") == graph.count("scaled_dot_product") == 0
    sites = freqopt.inspect(model, video(GRID), min_tokens=1).sites
    assert [site.name for site in sites] == ["blocks.0", "blocks.1"]
    assert all(not site.eligible and said in site.reason for site in sites)


def test_dropout_in_training_leaves_it() -> None:
    (site, _) = freqopt.inspect(Model(dropout=0.1).train(), video(GRID)).sites
    assert not site.eligible and "dropout" in site.reason


def test_short_sequences_keep_their_node() -> None:
    _, _, graph = run(Model().eval(), video(GRID), min_tokens=1000)
    assert graph.count("multi_head") == 2 and graph.count("linear") == 0


def test_symbolic_sizes() -> None:
    model = Model().eval()
    compiled = torch.compile(
        model,
        backend=freqopt_backend,
        dynamic=True,
        options={"threshold": 0.0, "min_tokens": 1, "inner": "aot_eager", "strict": True},
    )
    freqopt.reset_counters()
    with torch.no_grad():
        for grid in ((5, 7, 9), (3, 6, 10)):
            x = video(grid, 2)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert freqopt.counters().split == 4


def test_a_whole_encoder_layer_in_one_node_says_how_to_open_it() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    weight = torch.randn(WIDTH, 3, 1, 2, 2)

    def model(x: Tensor) -> Tensor:
        return layer(toys.conv3d_tokens(x, weight))

    (site,) = sites_of(model, video(GRID))
    assert not site.eligible and "set_fastpath_enabled(False)" in site.reason


def every(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return b >= 0


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, scale=0.4)


def flex_scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs())


def flex_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.shape[2]
    mask = create_block_mask(every, None, None, tokens, tokens, device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def flex_with_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, sums = flex_attention(q, k, v, return_lse=True)
    return out + sums[..., None]


def test_flex_attention_without_mask_and_score_function_is_split() -> None:
    model = toys.Toy(attend=flex)
    x = video((5, 7, 9), 2)
    out, expected, graph = run(model, x, strict=True)
    assert (graph.count("split_attention"), graph.count("flex_attention")) == (2, 0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("attend", "said"),
    [(flex_scored, "score_mod"), (flex_masked, "block mask"), (flex_with_sums, "logsumexp")],
)
def test_flex_attention_of_its_own_stays(attend: Any, said: str) -> None:
    for site in sites_of(toys.Toy(attend=attend), video(GRID)):
        assert not site.eligible and said in site.reason
    with pytest.raises(freqopt.SiteError, match=said):
        run(toys.Toy(attend=attend), video(GRID), strict=True)
