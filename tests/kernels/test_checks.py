"""The registered op refuses tensors that do not belong together, whoever calls it, and on meta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import relative
from torch import Tensor

import freqopt
from freqopt.errors import InputError
from freqopt.kernels import op
from freqopt.kernels.at_call import split_attention_at_call

GRID = (3, 6, 10)
NAMES = (
    "query",
    "key",
    "value",
    "threshold",
    "key_mask",
    "grid",
    "text_before",
    "text_after",
    "scale",
    "density",
    "probes",
    "chunks",
    "largest_chunk",
    "key_order",
    "query_order",
    "query_layout",
    "log_sum",
)


def arguments(**changed: Any) -> list[Any]:
    """A good call with 4 query heads, 2 key heads and queries of their own, and what is changed."""
    heads = [torch.randn(2, n, 185, 8) for n in (2, 2)]
    good = [
        torch.randn(2, 4, 123, 8),
        *heads,
        torch.ones(4),
        torch.ones(2, 185, dtype=torch.bool),
        list(GRID),
        3,
        2,
        0.3,
        0.0,
        4,
        torch.full((2,), 256, dtype=torch.int32),
        256,
        torch.stack([torch.randperm(180) for _ in range(4)]).view(2, 2, 180).int(),
        torch.stack([torch.randperm(120) for _ in range(8)]).view(2, 4, 120).int(),
        [2, 6, 10, 1, 2],
        True,
    ]
    named = dict(zip(NAMES, good, strict=True))
    assert set(changed) <= set(named)
    return list({**named, **changed}.values())


def hostile() -> Iterator[tuple[str, dict[str, Any]]]:
    order, other = arguments()[13:15]
    yield "threshold", {"threshold": torch.ones(1)}
    yield "threshold", {"threshold": torch.ones(5)}
    yield "threshold", {"threshold": torch.ones(4, 1)}
    yield "threshold", {"threshold": torch.ones(4, dtype=torch.float64)}
    yield "key_mask", {"key_mask": torch.ones(1, 185, dtype=torch.bool)}
    yield "key_mask", {"key_mask": torch.ones(2, 184, dtype=torch.bool)}
    yield "key_mask", {"key_mask": torch.ones(2, 185)}
    yield "chunks", {"chunks": torch.full((4,), 256, dtype=torch.int32)}
    yield "chunks", {"chunks": torch.full((2,), 256)}
    yield "key_order", {"key_order": order[..., :-1]}
    yield "key_order", {"key_order": order.long()}
    yield "key_order", {"key_order": order[:, :1]}
    yield "key_order is no permutation", {"key_order": order + 1}
    yield "key_order is no permutation", {"key_order": order * 0}
    yield "key_order is no permutation", {"key_order": order - 1}
    yield "query_order", {"query_order": other[:, :2]}
    yield "query_order is no permutation", {"query_order": other * 0}
    yield "key is", {"key": torch.randn(2, 2, 185, 16)}
    yield "value is", {"value": torch.randn(2, 2, 184, 8)}
    yield "value is", {"value": torch.randn(2, 2, 185, 8).half()}
    yield "not a multiple", {"query": torch.randn(2, 3, 123, 8)}
    yield "head_dim", {"query": torch.randn(2, 4, 185)}
    yield "is not a sequence of 185", {"grid": [3, 6, 11]}
    yield "is not a sequence of 185", {"grid": [-3, -6, 10]}
    yield "is not a sequence of 185", {"grid": [0, 6, 10], "text_before": 183}
    yield "is not a sequence of 185", {"text_before": -1, "text_after": 6}
    yield "is not a sequence of 123", {"query_layout": [2, 6, 10, 1, 3]}
    yield "need a query_layout", {"query_layout": None, "query_order": None}
    yield "scale", {"scale": float("nan")}
    yield "density", {"density": float("nan")}
    yield "density", {"density": 1.5}
    yield "probes", {"probes": -1}
    yield "probes", {"probes": 10**9}
    yield "largest_chunk", {"largest_chunk": 300}
    yield "largest_chunk", {"largest_chunk": -256}


def test_the_good_call_is_good() -> None:
    out, _, _, _, _, log_sum, *_ = op.split_attention_op(*arguments())
    assert out.isfinite().all() and log_sum.isfinite().all()


@pytest.mark.parametrize("index", range(len(list(hostile()))))
def test_what_does_not_belong_together_is_refused(index: int) -> None:
    message, changed = list(hostile())[index]
    with pytest.raises(InputError, match=message):
        op.split_attention_op(*arguments(**changed))


@pytest.mark.parametrize("name", ["threshold", "key_mask", "chunks", "key_order", "value"])
def test_a_tensor_on_meta_beside_real_ones_is_refused(name: str) -> None:
    """The dispatcher takes the implementation that only allocates: memory that nobody wrote."""
    given = arguments()[NAMES.index(name)]
    with pytest.raises(InputError, match="on meta"):
        op.split_attention_op(*arguments(**{name: given.to("meta")}))


def test_a_call_on_meta_alone_gives_shapes() -> None:
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments()]
    shapes = [tuple(x.shape) for x in op.split_attention_op(*meta)]
    assert shapes == [tuple(x.shape) for x in op.split_attention_op(*arguments())]


def test_the_op_at_call_passes_it_on() -> None:
    q = torch.randn(1, 2, 180, 8)
    for threshold in (torch.ones(1), torch.ones(2, device="meta")):
        with pytest.raises(InputError):
            split_attention_at_call(q, q, q, threshold, None, list(GRID), 0, 0, 0.3, 0.0, 4)


@pytest.mark.parametrize("shape", [(0, 2, 180, 8), (1, 0, 180, 8)])
def test_no_items_and_no_heads_are_served_with_nothing(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    out, stats = freqopt.split_attention(q, q, q, grid=GRID, threshold=1.0, return_stats=True)
    assert out.shape == shape and stats.density.shape == shape[:2]
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == shape


def test_gradients_of_another_shape_are_refused() -> None:
    q = torch.randn(1, 2, 180, 8)
    out, _, _, route, coefficients, *_, matrix = op.split_attention_op(
        q, q, q, torch.ones(2), None, list(GRID), 0, 0, 0.3, 0.0, 4
    )
    layout = [*GRID, 0, 0]
    for grad, sums, scalars, turn in (
        (out[:, :1], None, coefficients, matrix),
        (out, torch.ones(1, 2, 179), coefficients, matrix),
        (out, None, coefficients[:, :1], matrix),
        (out, None, coefficients, matrix[..., :4]),
        (out, None, coefficients, matrix.double()),
    ):
        with pytest.raises(InputError):
            op.split_attention_backward_op(
                grad, sums, q, q, q, None, out, route, scalars, turn, None, None, layout, None, 0.3
            )


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_threshold_that_is_no_threshold_is_dense(value: float) -> None:
    q = torch.randn(1, 2, 180, 8)
    out = freqopt.split_attention(q, q, q, grid=GRID, threshold=torch.tensor([value, 0.0]))
    assert isinstance(out, Tensor)
    assert relative(out, torch.nn.functional.scaled_dot_product_attention(q, q, q)) < 1e-5


def test_two_derivatives_are_refused_in_words_and_transforms_are_right_or_refused() -> None:
    q = torch.randn(1, 2, 180, 8, requires_grad=True)
    out = freqopt.split_attention(q, q, q, grid=GRID, threshold=1.0)
    assert isinstance(out, Tensor)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="split_attention_backward"):
        first.sum().backward()
    many = torch.randn(3, 1, 2, 180, 8)

    def attend(x: Tensor) -> Tensor:
        found = freqopt.split_attention(x, x, x, grid=GRID, threshold=1.0)
        assert isinstance(found, Tensor)
        return found

    try:
        found = torch.func.vmap(attend)(many)
    except (RuntimeError, NotImplementedError) as error:
        assert "vmap" in str(error) or "split_attention" in str(error)
    else:
        assert relative(found, torch.stack([attend(x) for x in many])) < 1e-6


@pytest.mark.parametrize(
    "grid", [(3.0, 6, 10), ("3", 6, 10), "abc", 5, (True, 18, 10), (3, 6), {3, 6, 10}]
)
def test_grids_are_whole_numbers(grid: Any) -> None:
    q = torch.randn(1, 2, 180, 8)
    with pytest.raises(InputError, match="whole extents"):
        freqopt.split_attention(q, q, q, grid=grid, threshold=1.0)


META = torch.ones(2, device="meta")
OTHER_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("query is a ndarray", {"query": torch.ones(1, 2, 180, 8).numpy()}),
    ("key is a list", {"key": [1.0]}),
    ("value is a NoneType", {"value": None}),
    ("query is a torch.sparse_coo", {"query": torch.ones(1, 2, 180, 8).to_sparse()}),
    ("key_mask is a list", {"key_mask": [True] * 180}),
    ("query_order is a list", {"query_order": [0, 1]}),
    ("threshold is 'x'", {"threshold": "x"}),
    ("threshold is 1j", {"threshold": 1j}),
    (r"threshold is \[1.0", {"threshold": [1.0, 1.0]}),
    ("threshold is torch.complex64", {"threshold": torch.ones(2, dtype=torch.complex64)}),
    ("threshold is torch.float32 on meta", {"threshold": META}),
    ("density is 'x'", {"density": "x"}),
    ("density 10000", {"density": 10**400}),
    ("scale is 'x'", {"scale": "x"}),
    ("scale 10000", {"scale": 10**400}),
    ("probes is 2.0", {"probes": 2.0}),
    ("probes is None", {"probes": None}),
    ("text_before is '0'", {"text_before": "0"}),
    ("text_after is None", {"text_after": None}),
    ("order is torch.float32 .* on meta", {"order": META}),
    ("order is torch.int32 .* on meta", {"order": META.int()}),
    ("order is .* on meta", {"order": torch.ones(1, 2, 180, dtype=torch.int32, device="meta")}),
    ("mid_band is 'yes'", {"mid_band": "yes"}),
    ("mid_band is torch.bool .* on meta", {"mid_band": META.bool()}),
]


@pytest.mark.parametrize("said, changed", OTHER_KINDS, ids=lambda x: x if type(x) is str else "")
def test_arguments_of_another_kind_are_named(said: str, changed: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 180, 8)
    given: dict[str, Any] = {"query": q, "key": q, "value": q, "grid": GRID}
    with pytest.raises(InputError, match=said):
        freqopt.split_attention(**{**given, **changed})


@pytest.mark.parametrize("value", [1e308, 10**400, float("inf")])
def test_a_threshold_larger_than_all_numbers_keeps_the_local_blocks(value: float) -> None:
    q = torch.randn(1, 2, 180, 8)
    kept = freqopt.split_attention(q, q, q, grid=GRID, threshold=value)
    assert isinstance(kept, Tensor)
    limits = torch.full((2,), float("inf"))
    wanted = freqopt.split_attention(q, q, q, grid=GRID, threshold=limits)
    assert isinstance(wanted, Tensor) and torch.equal(kept, wanted)


@pytest.mark.parametrize("heads", [2, 24])
def test_swapped_tokens_and_heads_are_recognised_beside_a_grid(heads: int) -> None:
    swapped = torch.randn(1, 180, heads, 8)
    with pytest.raises(InputError, match=r"pass x\.transpose\(1, 2\)"):
        freqopt.split_attention(swapped, swapped, swapped, grid=GRID)
