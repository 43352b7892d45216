"""diffusers' video transformers and ours: the sites found, and equality at each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_models import CASES, output
from passes_toys import sites_of
from torch import Tensor, fx

from freqopt.backend import freqopt_backend
from freqopt.kernels.attention import split_attention
from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.rewrite import replace_site

TEXT = 7
EXACT = {"threshold": 0.0, "min_tokens": 1, "strict": True, "inner": "eager"}


LARGE, IMAGE, SMALL = ((5, 7, 9), 2), ((1, 6, 10), 2), ((3, 6, 10), 1)


@pytest.mark.parametrize(
    ("name", "grid", "batch"),
    [
        *((name, *LARGE) for name in CASES),
        *((name, *IMAGE) for name in ("wan", "video_dit")),
        *(pytest.param(name, *IMAGE, marks=pytest.mark.slow) for name in ("hunyuan", "cogvideox")),
        *(pytest.param(name, *SMALL, marks=pytest.mark.slow) for name in CASES),
    ],
)
def test_sites_kinds_grids_and_text(name: str, grid: tuple[int, int, int], batch: int) -> None:
    case = CASES[name]
    found = sites_of(case.make(), **case.inputs(grid, batch, TEXT))
    assert [site.name for site in found] == [site for site, _, _ in case.sites]
    for site, (_, kind, side) in zip(found, case.sites, strict=True):
        if kind in ("cross", "text"):
            assert site.kind == ("self" if kind == "text" else kind)
            assert not site.eligible and site.grid is None
            continue
        assert site.eligible, site.reason
        assert (site.kind, site.grid) == (kind, grid)
        assert site.text_before == (TEXT if side == "before" else 0)
        assert site.text_after == (TEXT if side == "after" else 0)


@pytest.mark.parametrize(
    "name",
    [
        "video_dit",  # the others' classes are in tests/models, where the same is asked of them
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("wan", "hunyuan", "cogvideox")),
    ],
)
def test_split_equals_dense_at_each_site(name: str) -> None:
    """At threshold 0, where each sees what the model feeds it; at the output errors may hide."""
    case, errors, noise = CASES[name], [], []

    def both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        grid, before, after, scale = rest
        allowed = None if mask is None else mask[:, None, None]
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
        place = {"grid": grid, "text_before": before, "text_after": after, "key_mask": mask}
        split = split_attention(q, k, v, threshold=0.0, scale=scale, **place)
        rough = split_attention(q, k, v, density=0.05, scale=scale, probes=0, **place)
        assert isinstance(split, Tensor) and isinstance(rough, Tensor)
        errors.append(float((split - dense).norm() / dense.norm()))
        noise.append(float((rough - dense).norm() / dense.norm()))
        return split

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for site in find_sites(gm):
            if site.eligible:
                replace_site(gm, site, both)
        gm.recompile()
        return gm.forward

    model, inputs = case.make(), case.inputs((5, 7, 9), 2, TEXT)
    with torch.no_grad():
        expected = output(model(**inputs))
        got = output(torch.compile(model, backend=backend, dynamic=False)(**inputs))
    assert len(errors) == sum(kind in ("self", "joint") for _, kind, _ in case.sites)
    assert max(errors) < 1e-5
    assert min(noise) > 1e-4, "so coarse a split must show, or this test sees nothing"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("wan", None),
        ("video_dit", True),
        pytest.param("hunyuan", None, marks=pytest.mark.slow),
        pytest.param("cogvideox", True, marks=pytest.mark.slow),
    ],
)
def test_dynamic_shapes_compile_a_bounded_number_of_times(name: str, dynamic: bool | None) -> None:
    """One graph when dynamic; with automatic dynamic shapes one for the first size and one more."""
    case = CASES[name]
    model = case.make()
    counter = Counting()
    compiled = torch.compile(model, backend=counter, dynamic=dynamic)
    with torch.no_grad():
        for grid, text in (((5, 6, 10), 7), ((6, 7, 9), 8), ((7, 9, 8), 11), ((8, 5, 4), 7)):
            inputs = case.inputs(grid, 2, text)
            got, expected = output(compiled(**inputs)), output(model(**inputs))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counter.graphs <= (1 if dynamic else 2)


class Counting:
    """The backend at threshold 0, counting its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def inner(rewritten: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            names = [str(node.target) for node in rewritten.graph.nodes]
            assert names.count("freqopt.split_attention.default") == 2
            return rewritten.forward

        return freqopt_backend(gm, example_inputs, options={**EXACT, "inner": inner})
