"""Every argument of the op, well and badly chosen: an InputError, or a right result.

Of what is accepted, shapes are those promised, and at threshold 0 it is dense attention.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import freqopt
from freqopt.errors import FreqoptError
from freqopt.kernels import op

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
NAN = float("nan")
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def sizes(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most)


@st.composite
def grids(draw: st.DrawFn) -> Any:
    """Grids as they should be, mostly."""
    extent = st.integers(1, 7)
    good = st.tuples(extent, extent, extent)
    odd = st.sampled_from(
        [
            None,
            (),
            (2, 2),
            "abc",
            (2.0, 2, 2),
            (0, 3, 3),
            (-2, -2, 4),
            (10**30, 1, 1),
            ("2", 2, 2),
            (True, 2, 2),
            (2, 2, 2, 1),
            [3, 4, 5],
            5,
        ]
    )
    return draw(odd if draw(st.integers(0, 5)) == 0 else good)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    grid = draw(grids())
    tokens = 60
    if isinstance(grid, tuple) and len(grid) == 3 and all(type(x) is int for x in grid):
        tokens = max(min(grid[0] * grid[1] * grid[2], 343), 1)
    before, after = draw(sizes(3)), draw(sizes(3))
    length = tokens + before + after
    batch, kv_heads, share, dim = draw(sizes(2)), draw(sizes(2)), draw(sizes(2)), draw(sizes(9))
    generator = torch.Generator().manual_seed(draw(sizes(99)))
    dtype = draw(st.sampled_from(DTYPES[:3] * 3 + DTYPES))
    other = draw(st.integers(0, 3)) == 0
    queries = draw(sizes(200)) if other else length
    shapes = [(batch, kv_heads * share, queries, dim), *[(batch, kv_heads, length, dim)] * 2]
    if draw(st.integers(0, 9)) == 0:
        shapes[draw(sizes(2))] = tuple(draw(st.lists(sizes(4), max_size=5)))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    heads = kv_heads * share

    def some(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    options: dict[str, Any] = {"grid": grid, "text_before": before, "text_after": after}
    options |= some(
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"threshold": torch.rand(heads)},
        {"threshold": torch.rand(heads + 1)},
        {"threshold": NAN},
        {"threshold": -1.0},
        {"threshold": float("inf")},
        {"threshold": torch.full((heads,), NAN)},
        {"density": 0.3},
        {"density": 0.0},
        {"density": NAN},
        {"density": 2.0},
        {},
        {"threshold": 1.0, "density": 0.5},
    )
    options |= some({}, {}, {"probes": 0}, {"probes": 1}, {"probes": -1}, {"probes": 10**6})
    options |= some({}, {}, {}, {"scale": NAN}, {"scale": 0.0}, {"scale": float("inf")})
    mask = torch.rand(batch, length, generator=generator) > 0.5
    of_text = mask.clone()
    of_text[:, before : before + tokens] = True
    options |= some(
        {},
        {},
        {"key_mask": of_text},
        {"key_mask": mask},
        {"key_mask": of_text[:, 1:]},
        {"key_mask": of_text.int()},
    )
    options |= some(
        {},
        {},
        {"order": "content"},
        {"order": "content", "chunk": 256},
        {"order": "up"},
        {"order": "content", "chunk": 7},
        {"order": torch.zeros(kv_heads, dtype=torch.int32)},
        {"order": torch.zeros(batch, kv_heads, tokens, dtype=torch.int64)},
        {"order": torch.arange(tokens).expand(batch, kv_heads, tokens)},
    )
    if other:
        options |= some({}, {"query_text_before": 1}, {"query_grid": (1, 2, 3)})
    options |= some({}, {"return_lse": True}, {"return_lse": True, "return_stats": True})
    return tensors, options


def check(case: tuple[list[Tensor], dict[str, Any]]) -> bool:
    """Whether the call was accepted."""
    tensors, options = case
    try:
        found = freqopt.split_attention(*tensors, **options)
    except FreqoptError as error:
        assert str(error)
        return False
    out = found[0] if isinstance(found, tuple) else found
    assert out.shape == tensors[0].shape and out.dtype == tensors[0].dtype
    assert out.isfinite().all()
    if options.get("return_lse"):
        assert found[1].shape == out.shape[:3] and not found[1].isnan().any()
    exact = isinstance(options.get("threshold"), float) and options["threshold"] == 0.0
    if exact and out.numel():
        query, key, value = (x.float() for x in tensors)
        mask = options.get("key_mask")
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None],
            scale=options.get("scale"),
            enable_gqa=True,
        )
        assert relative(out.float(), wanted) < 2e-2
    return True


accepted: list[bool] = []


@settings(max_examples=150, **SETTINGS)
@given(calls())
def test_a_call_is_refused_or_right(case: tuple[list[Tensor], dict[str, Any]]) -> None:
    accepted.append(check(case))


def test_some_of_them_were_accepted() -> None:
    if not accepted:
        pytest.skip("the test before this one did not run")
    assert sum(accepted) > len(accepted) // 50 and not all(accepted)


@pytest.mark.slow
@settings(max_examples=20_000, **SETTINGS)
@given(calls())
def test_many_calls_are_refused_or_right(case: tuple[list[Tensor], dict[str, Any]]) -> None:
    check(case)


@st.composite
def raw_calls(draw: st.DrawFn) -> list[Any]:
    """The registered op's arguments, one or two of them exchanged for something else."""
    q, k = torch.randn(2, 4, 123, 8), torch.randn(2, 2, 185, 8)
    order = torch.stack([torch.randperm(180) for _ in range(4)]).view(2, 2, 180).int()
    good: list[Any] = [
        q,
        k,
        k,
        torch.ones(4),
        torch.ones(2, 185, dtype=torch.bool),
        [3, 6, 10],
        3,
        2,
        0.3,
        0.0,
        4,
        torch.full((2,), 256, dtype=torch.int32),
        256,
        order,
        None,
        [2, 6, 10, 1, 2],
        True,
    ]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(good) - 1))
        old = good[at]
        if isinstance(old, Tensor):
            good[at] = draw(st.sampled_from(mutations(old)))
        elif isinstance(old, list):
            index = draw(st.integers(0, len(old) - 1))
            number = draw(st.sampled_from([0, 1, -1, 7, 2**31, -(2**62)]))
            good[at] = [*old[:index], number, *old[index + 1 :]]
        elif isinstance(old, bool) or old is None:
            continue
        elif isinstance(old, int):
            good[at] = draw(st.sampled_from([0, -1, 1, 2**31, 2**62, 512]))
        else:
            good[at] = draw(st.sampled_from([NAN, float("inf"), -1.0, 0.0, 1e300]))
    return good


def mutations(x: Tensor) -> list[Tensor]:
    found = [
        x[..., :-1],
        x[:1],
        x[:0],
        x.unsqueeze(0),
        x.flatten(),
        x.to("meta"),
        torch.cat([x, x]),
    ]
    found += [x.transpose(0, -1).contiguous(), x.double(), x.to(torch.int32), x.bool()]
    if not x.is_floating_point():
        found += [x.int() + 1, x.int() * 0, -x.int(), x.int() * 2**20]
    return found


@settings(max_examples=200, **SETTINGS)
@given(raw_calls())
def test_the_registered_op_refuses_or_serves(arguments: list[Any]) -> None:
    shape = arguments[0].shape
    try:
        out, density, *_ = op.split_attention_op(*arguments)
    except FreqoptError:
        return
    except (TypeError, RuntimeError) as error:  # what the dispatcher itself refuses
        assert "freqopt::split_attention" in str(error) or "schema" in str(error).lower(), error
        return
    assert out.shape == shape
    if out.device.type != "meta" and arguments[3].dtype == torch.float32:
        assert out.isfinite().all() and ((density >= 0) & (density <= 1)).all()
