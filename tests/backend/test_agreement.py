"""Compiling, inspecting, calibrating and exporting agree: what is split, on which grid, why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import passes_toys as toys
import pytest
import test_passes_keys as keys
import test_passes_masks as masks
import test_passes_packed as packed
import test_passes_spellings as spellings
import torch
from accounts import Case, check_agreement
from passes_toys import TEXT, Toy, text, video
from torch import Tensor

import freqopt.decisions
from freqopt.exporters.program import make_program

GRID = (3, 6, 10)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias that the product of queries and keys is added to."""
    bias = -torch.arange(k.shape[1], dtype=q.dtype).expand(q.shape[0], q.shape[1], -1)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(-1, -2)).softmax(-1), v)


def toy(tokens: Callable[[Tensor, Tensor], Tensor], split: int = 2) -> Callable[[], Case]:
    return lambda: Case(Toy(tokens).eval(), {"video": video(GRID, 2)}, split)


def with_text(where: str) -> Callable[[], Case]:
    return lambda: Case(Toy(text=where).eval(), {"video": video(GRID), "text": text()}, 2)


def spelled(mix: spellings.Mixer, split: int = 1, folded: bool = False) -> Callable[[], Case]:
    return lambda: Case(spellings.toy(mix, folded=folded).eval(), {"video": video(GRID)}, split)


def multihead(attend: packed.Attend) -> Callable[[], Case]:
    return lambda: Case(packed.Model(attend).eval(), {"x": video(GRID)}, 2)


def text_in_keys(where: str) -> Callable[[], Case]:
    inputs = {"video": video(GRID), "text": text()}
    return lambda: Case(keys.TextInKeys(where).eval(), inputs, 1)


def masked(make: Any, split: int = 1) -> Callable[[], Case]:
    inputs = {"video": video(GRID, 2), "context": text(batch=2), "kept": torch.ones(2, TEXT).long()}
    return lambda: Case(masks.Masked(make).eval(), inputs, split)


TOKENS = [
    toys.conv3d_tokens,
    toys.conv2d_tokens,
    toys.linear_tokens,
    toys.einsum_tokens,
    toys.padded_tokens,
    toys.time_fastest_tokens,
]
CASES: dict[str, Callable[[], Case]] = {
    **{tokens.__name__: toy(tokens) for tokens in TOKENS},
    "tiled_tokens": toy(toys.tiled_tokens, split=0),
    "text before": with_text("before"),
    "text after": with_text("after"),
    "by hand": spelled(spellings.plain),
    "einsum": spelled(spellings.einsum_of_tokens_first),
    "baddbmm": spelled(spellings.legacy_baddbmm, folded=True),
    "altered scores": spelled(spellings.capped, split=0),
    "causal": spelled(spellings.causal_fused, split=0),
    "bias": spelled(biased, split=0, folded=True),
    "nn.MultiheadAttention": multihead(packed.plain),
    "and its weights": multihead(packed.unused_weights),
    "text in keys": text_in_keys("both"),
    "mask by length": masked(masks.length_mask),
    "joined mask": masked(masks.joined_mask),
    "mask over video": masked(masks.written_mask, split=0),
}


@pytest.mark.parametrize("name", CASES)
def test_all_four_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check_agreement(CASES[name](), monkeypatch)


@pytest.mark.parametrize(
    "name", ["einsum", "baddbmm", "and its weights", "text in keys", "mask by length"]
)
def test_what_is_exported_is_dense_attention_at_full_density(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    monkeypatch.setattr(freqopt.decisions, "DEFAULT_DENSITY", 1.0)
    program = make_program(case.model, (), case.inputs)
    assert len(program.split) == case.split
    with torch.no_grad():
        got, want = program.exported.module()(**case.inputs), case.model(**case.inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
