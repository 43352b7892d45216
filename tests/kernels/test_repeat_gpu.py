"""On a GPU, calls that are repeated give what calls give that are launched kernel by kernel."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import freqopt
from freqopt.kernels import repeat
from freqopt.kernels.repeat import REPEATER, Recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GRID = (5, 9, 14)
TOKENS = 5 * 9 * 14

FORMS: dict[str, dict[str, Any]] = {
    "grid": {},
    "text and a mask": {"text_before": 3, "text_after": 14, "masked": True},
    "a density": {"threshold": None, "density": 0.3},
    "content": {"order": "content", "chunk": 256},
    "content, all": {"order": "content"},
    "grouped heads": {"kv_heads": 2},
    "head dim 40": {"dim": 40},
    "float32": {"dtype": torch.float32},
    "sums": {"return_lse": True},
    "no probes": {"probes": 0},
    "packed": {"packed": True},
    "large": {"grid": (9, 30, 52), "heads": 110, "dim": 64},
}
"""The last one is large enough for two streams."""


def make(
    seed: int, *, grid: tuple[int, int, int] = GRID, heads: int = 4, kv_heads: int | None = None,
    dim: int = 64, dtype: torch.dtype = torch.bfloat16, masked: bool = False, packed: bool = False,
    **options: Any,
) -> tuple[list[torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Tensors and options of a call."""
    generator = torch.Generator("cuda").manual_seed(seed)
    text = options.get("text_before", 0) + options.get("text_after", 0)
    tokens = grid[0] * grid[1] * grid[2] + text

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", generator=generator).to(dtype)

    if packed:
        tensors = list(draw(2, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0))
    else:
        tensors = [draw(2, h, tokens, dim) for h in (heads, kv_heads or heads, kv_heads or heads)]
    given: dict[str, Any] = {"grid": grid, "threshold": 1.2, "return_stats": True, **options}
    if masked:
        mask = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
        mask[1, -5:] = False
        given["key_mask"] = mask
    return tensors, given


def called(tensors: list[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    """All that a call gives, as a list of tensors."""
    return [
        x.clone()
        for x in torch.utils._pytree.tree_leaves(freqopt.split_attention(*tensors, **options))
        if isinstance(x, torch.Tensor)
    ]


def recordings() -> list[Any]:
    return [x for x in REPEATER._known.values() if isinstance(x, Recording)]


@pytest.mark.parametrize("form", FORMS)
def test_repeated_calls_give_the_same_bits(form: str) -> None:
    calls = [make(seed, **FORMS[form]) for seed in range(4)]
    with REPEATER.plainly():
        wanted = [called(*call) for call in calls]
    assert not REPEATER._known
    found = [called(*call) for call in calls]
    assert len(recordings()) == 1, "the second call is recorded, the others are repeated"
    found += [called(*call) for call in calls]
    for each, truth in zip(found, wanted * 2, strict=True):
        assert len(each) == len(truth) > 1
        for x, y in zip(each, truth, strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    assert not torch.equal(wanted[0][0], wanted[1][0])


def test_another_form_is_another_recording() -> None:
    for seed in range(3):
        called(*make(seed))
        called(*make(seed, heads=3))
        called(*make(seed, probes=16))
    assert len(recordings()) == 3


def test_in_a_cuda_graph() -> None:
    tensors, options = make(0)
    options |= {"return_stats": False}
    for _ in range(3):
        freqopt.split_attention(*tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = freqopt.split_attention(*tensors, **options)
    others, _ = make(1)
    for own, other in zip(tensors, others, strict=True):
        own.copy_(other)
    graph.replay()
    with REPEATER.plainly():
        assert torch.equal(out, freqopt.split_attention(*others, **options))


def test_from_several_threads() -> None:
    calls = [make(seed) for seed in range(4)]
    with REPEATER.plainly():
        wanted = [called(*call)[0] for call in calls]
    for _ in range(2):
        called(*calls[0])
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(25):
                found = called(*calls[index])[0]
                torch.cuda.current_stream().synchronize()
                if not torch.equal(found, wanted[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_no_more_than_launched_one_by_one() -> None:
    tensors, options = make(0, grid=(9, 30, 52), heads=24)
    options |= {"return_stats": False}

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        freqopt.split_attention(*tensors, **options)
        return torch.cuda.max_memory_allocated() - before

    with REPEATER.plainly():
        peak()
        plain = peak()
    for _ in range(2):
        freqopt.split_attention(*tensors, **options)
    assert len(recordings()) == 1
    assert peak() <= 1.02 * plain


def test_a_call_that_repeats_otherwise_is_launched_plainly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(repeat, "_same", lambda a, b: False)
    tensors, options = make(0)
    with REPEATER.plainly():
        wanted = called(tensors, options)
    for _ in range(4):
        assert torch.equal(called(tensors, options)[0], wanted[0])
    assert not recordings() and "one kernel at a time" in caplog.text
