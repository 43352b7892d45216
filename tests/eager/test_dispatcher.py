"""The backend "freqopt" of diffusers' attention dispatcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freqopt
from freqopt.eager import calling, dispatcher
from freqopt.eager.announced import announce
from freqopt.errors import InputError, OptionError

pytest.importorskip("diffusers")


def tensors() -> list[Tensor]:
    return [torch.randn(2, 9, 4, 8) for _ in range(3)]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "is_serving", lambda: True)


def spread(rank: int = 1, ranks: int = 2, ring: int = 1) -> Any:
    mesh = SimpleNamespace(get_local_rank=lambda: rank)
    held = SimpleNamespace(ring_degree=ring, ulysses_degree=ranks, _ulysses_mesh=mesh)
    return SimpleNamespace(context_parallel_config=held)


def test_it_is_one_of_the_dispatchers_names_and_dense_outside_a_plan(serving: None) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    member = dispatcher.register()
    assert member is dispatcher.register() is AttentionBackendName("freqopt")
    assert AttentionBackendName.__members__["FREQOPT"] is member
    assert AttentionBackendName("native").value == "native"
    query, key, value = tensors()
    mask = torch.rand(2, 9) > 0.3
    for each in (None, mask):
        mine, theirs = (
            dispatch_attention_fn(query, key, value, attn_mask=each, backend=backend)
            for backend in ("freqopt", "native")
        )
        assert torch.allclose(mine, theirs, atol=1e-6)


KNOWN = """
import sys
import freqopt
assert not any(name.split(".")[0] == "diffusers" for name in sys.modules)
assert type(sys.meta_path[0]).__name__ == "_Waiting"
from diffusers.models.attention_dispatch import AttentionBackendName
assert AttentionBackendName("freqopt").value == "freqopt"
assert not any(type(finder).__name__ == "_Waiting" for finder in sys.meta_path)
import diffusers.models.attention_dispatch as theirs
assert theirs.AttentionBackendName is AttentionBackendName
"""


def test_it_is_known_as_soon_as_both_are_imported() -> None:
    root = Path(freqopt.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KNOWN], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_another_version_of_diffusers_is_imported_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise AttributeError("_AttentionBackendRegistry")

    monkeypatch.setattr(dispatcher, "register", fails)
    announce()
    assert "another than the one that is known (AttributeError: _Att" in caplog.text


def test_without_a_plan_it_says_what_to_do() -> None:
    with pytest.raises(OptionError, match=r"freqopt\.optimize"):
        dispatcher._attention(*tensors())


def test_what_no_rank_can_do_is_refused(serving: None) -> None:
    query, key, value = tensors()
    with pytest.raises(InputError, match="a ring of 2 GPUs"):
        dispatcher._attention(query, key, value, _parallel_config=spread(ring=2))
    with pytest.raises(InputError, match="log-sum-exps"):
        dispatcher._attention(query, key, value, return_lse=True)
    with pytest.raises(InputError, match="gradients"):
        dispatcher._attention(query.requires_grad_(), key, value, _parallel_config=spread())


def test_a_rank_is_told_around_the_exchange(serving: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    seen: list[tuple[int, int] | None] = []

    def exchanged(query: Tensor, *rest: Any, forward_op: Any, backward_op: Any, **_: Any) -> Tensor:
        assert callable(forward_op) and callable(backward_op)
        seen.append(calling.under_way.share)
        return query

    name = "_templated_context_parallel_attention"
    monkeypatch.setattr(attention_dispatch, name, exchanged)
    with torch.no_grad():
        dispatcher._attention(*tensors(), _parallel_config=spread(rank=1, ranks=2))
    assert seen == [(1, 2)] and calling.under_way.share is None


def test_processors_get_their_backend_back() -> None:
    modules = [nn.Identity(), nn.Identity(), nn.Identity()]
    modules[0].processor = SimpleNamespace(_attention_backend="flash")
    modules[1].processor = SimpleNamespace()
    before = dispatcher.choose(modules)
    assert modules[0].processor._attention_backend == dispatcher.register()
    assert not hasattr(modules[1].processor, "_attention_backend")
    dispatcher.restore(before)
    assert modules[0].processor._attention_backend == "flash"
