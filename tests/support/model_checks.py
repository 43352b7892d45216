"""Compiles a model once, notes its sites, and compares each split site with dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from model_cases import Case, Grid, load_all
from torch import Tensor, fx

import freqopt.kernels.op  # noqa: F401  registers the op
from freqopt.capture.call_grids import OneCall
from freqopt.passes.axes.dimensions import hint
from freqopt.passes.axes.grid import Said
from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.rewrite import insert_split
from freqopt.passes.site import Site
from freqopt.passes.spellings.packed import packed_opened


@dataclass
class Seen:
    """What one compilation shows.

    plain: sites found without a grid from the user. used: those found as the case asks for, split
    at threshold 0. errors, noise: at each call of a split site, the relative distance from dense
    attention of the exact split and of a coarse one. got, expected: outputs, compiled and eager.
    """

    plain: list[Site] = field(default_factory=list)
    used: list[Site] = field(default_factory=list)
    graphs: int = 0
    errors: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    got: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)


def look(case: Case, grid: Grid, batch: int, *, dynamic: bool = False) -> Seen:
    """Build, run eagerly, compile with every eligible site split at threshold 0, and run."""
    torch.manual_seed(0)
    model, inputs = case.make(grid, batch)
    seen = Seen()
    backend = splitting(seen, grid if case.source == "given" else None)
    torch._dynamo.reset()
    with torch.no_grad():
        seen.expected = tensors(model(**inputs))
        compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=case.fullgraph)
        seen.got = tensors(compiled(**inputs))
    return seen


def problems_of(name: str, variant: int | None = None) -> list[str]:
    """What differs from the expectation of a case, on the variant that falls to it by default."""
    cases = load_all()
    case = cases[name]
    grid, batch = case.variant(list(cases).index(name) if variant is None else variant)
    return problems(case, grid, look(case, grid, batch))


def splitting(seen: Seen, grid: Grid | None) -> Callable[..., Any]:
    """A backend that splits at threshold 0 and measures at each site."""

    def measured(*arguments: Any) -> Any:
        exact = torch.ops.freqopt.split_attention.default(*arguments)
        query, key, value, budget, mask, lattice, before, after, scale, *_ = arguments
        allowed = None if mask is None else mask[:, None, None]
        dense = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        coarse = torch.ops.freqopt.split_attention.default(
            query, key, value, budget, mask, lattice, before, after, scale, 0.02, 0
        )
        seen.errors.append(float((exact[0] - dense).norm() / dense.norm()))
        seen.noise.append(float((coarse[0] - dense).norm() / dense.norm()))
        return exact

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.graphs += 1
        with packed_opened(gm):
            plain = find_sites(gm)
            said = Said(grid, order_of=OneCall(gm, example_inputs).order_of)
            used = find_sites(gm, said=said) if grid is not None else plain
            seen.plain += plain
            seen.used += used
            for site in used:
                if site.eligible:
                    zero = torch.zeros(2, site.heads)
                    insert_split(gm, site, zero, density=0.0, probes=0)
        for node in gm.graph.nodes:
            if node.target is torch.ops.freqopt.split_attention.default:
                node.target = measured
        gm.recompile()
        return gm.forward

    return backend


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a model's result."""
    return list(_tensors(result))


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for item in result.values():
            yield from _tensors(item)
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


def problems(case: Case, grid: Grid, seen: Seen) -> list[str]:
    """What differs from the expectation; empty if all is well."""
    dense = [site for site in seen.used if site.eligible]
    others = [site for site in seen.used if not site.eligible]
    found = [f"{site.name}: {site.reason}" for site in others if not site.reason]
    if (len(dense), len(others)) != (case.dense, case.others):
        found.append(f"{len(dense)} dense, {len(others)} others: {[s.reason for s in others]}")
    if case.source == "given":
        found += [f"{s.name}: split without grid=" for s in seen.plain if s.eligible]
    extents = [grid[0] + case.frames, *grid[1:]]
    for site, (kind, *around) in zip(dense, case.sites(), strict=False):
        text = (site.text_before, site.text_after)
        if site.kind != kind:
            found.append(f"{site.name}: kind {site.kind}")
        if site.grid is None or [hint(e) for e in site.grid] != [extents[i] for i in case.order]:
            found.append(f"{site.name}: grid {site.grid}")
        if not all(
            isinstance(a, torch.SymInt) or a == b for a, b in zip(text, around, strict=True)
        ):
            found.append(f"{site.name}: text {text}")
    if len(seen.errors) < case.dense:
        found.append(f"{len(seen.errors)} calls at {case.dense} sites")
    found += [f"error {e:.1e} at call {i}" for i, e in enumerate(seen.errors) if not e < 1e-5]
    found += [f"no noise at call {i}: too small" for i, e in enumerate(seen.noise) if not e > 1e-4]
    if not any(bool(tensor.any()) for tensor in seen.expected):
        found.append("no output, or nothing but zeros: it could not differ")
    for got, expected in zip(seen.got, seen.expected, strict=True):
        if not torch.allclose(got, expected, rtol=case.tolerance, atol=case.tolerance):
            found.append(f"output differs by {float((got - expected).abs().max()):.1e}")
    return found
