"""FlexAttention on the op's route, which the benchmark sets beside the op."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rivals
from benchmarks.natural import natural_attention
from freqopt.config import KEY_BLOCK, QUERY_TILE


def test_flex_is_given_the_listed_blocks_and_nothing_else() -> None:
    tokens = 297
    tiles, blocks = -(-tokens // QUERY_TILE), -(-tokens // KEY_BLOCK)
    exact = torch.rand(1, 2, tiles, blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    column = torch.arange(blocks)
    listed = torch.where(exact, column, blocks).sort(-1).values.to(torch.int32)
    listed[listed == blocks] = 77  # past the count there may be anything
    counts = exact.sum(-1).to(torch.int32)
    mask = rivals.block_mask(tokens, listed, counts)
    assert torch.equal(mask.to_dense().bool(), exact)
    assert mask.BLOCK_SIZE == (QUERY_TILE, KEY_BLOCK) and mask.seq_lengths == (tokens, tokens)


@pytest.mark.parametrize("there", [False, True])
def test_packages_are_measured_where_they_are(
    there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A made-up package of that name is found and called; without it there is no row."""
    module = "def sageattn(q, k, v, tensor_layout, is_causal):\n    return q + k + v\n"
    (tmp_path / "sageattention.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    if not there:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    a = natural_attention((2, 4, 4), heads=1, dim=16, dtype=torch.float32, device="cpu")
    found = rivals.installed(a)
    assert [(rival.name, rival.density) for rival in found] == [("sageattention", 1.0)] * there
    assert all(torch.equal(rival.run(), a.query + a.key + a.value) for rival in found)
