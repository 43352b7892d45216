"""Finds every attention site of a graph and says of each what it is and whether it can be split."""

from __future__ import annotations

import logging
import re
from collections import Counter

import torch
from torch import Tensor, fx

from freqopt.grid import Grid
from freqopt.passes import classify
from freqopt.passes.anchors import check_shapes, default_scale, find_matches, output_dtype
from freqopt.passes.dims import Dim, Dims
from freqopt.passes.graph_values import example, same, shape_of
from freqopt.passes.masks import always_true, honours
from freqopt.passes.provenance import Provenance
from freqopt.passes.site import Match, Site, SizeSource

logger = logging.getLogger(__name__)


def find_sites(gm: fx.GraphModule, *, grid: Grid | None = None) -> list[Site]:
    """Every attention computation of a graph, subgraphs of higher-order ops included.

    Args:
        gm: a Dynamo (pre-grad) graph, or an exported one before decompositions.
        grid: extents (t, h, w) where the graph does not tell them; used for sites whose video
            tokens it accounts for, and only there.

    Returns:
        Sites in graph order; those that cannot be split have `eligible` False and a reason.
    """
    sites = _find(gm, Provenance(gm), grid)
    lattices = [s for s in sites if s.grid is not None]
    for site in sites:
        if site.grid is None and site.eligible:
            site.eligible = False
        if lattices and site.grid is not None and site.grid[:2] == (1, 1):
            if any(other.grid is not None and other.grid[:2] != (1, 1) for other in lattices):
                site.grid, site.eligible = None, False
                site.reason = "attends over a plain sequence beside the video (text or audio)"
    _make_unique(sites)
    for site in sites:
        logger.debug("%s: %s, %s, %s", site.name, site.kind, site.grid, site.reason)
    return sites


def _find(gm: fx.GraphModule, provenance: Provenance, grid: Grid | None) -> list[Site]:
    found = []
    for match in find_matches(gm.graph):
        problem = check_shapes(match)
        if problem and match.form == "softmax":
            continue
        found.append(_site(gm, provenance, match, problem, grid))
    for node, child in provenance.children.items():
        body = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
        found += _find(getattr(gm, str(body.target)), child, grid)
    return found


def _site(
    gm: fx.GraphModule, provenance: Provenance, match: Match, problem: str | None, grid: Grid | None
) -> Site:
    query, key = (shape_of(n) or (1, 1, 1, 1) for n in (match.query, match.key))
    if match.key_transposed and len(key) >= 2:
        key = (*key[:-2], key[-1], key[-2])
    value = example(match.query)
    q_dims, k_dims = provenance.of(match.query), provenance.of(match.key)
    if match.key_transposed and k_dims is not None:
        k_dims = (*k_dims[:-2], k_dims[-1], k_dims[-2])
    match.scale = default_scale(match)
    folded = _folded_heads(q_dims) if len(query) == 3 else None
    site = Site(
        name=site_name(match.node),
        kind="other",
        heads=query[1] if len(query) == 4 else (folded or 1),
        kv_heads=key[1] if len(key) == 4 else (folded or 1),
        head_dim=query[-1] if isinstance(query[-1], int) else 0,
        query_length=query[-2],
        key_length=key[-2],
        grid=None,
        text_before=0,
        text_after=0,
        eligible=False,
        reason=problem or "",
        match=match,
        graph=gm,
        dtype=output_dtype(match) or torch.float32,
        device=value.device if isinstance(value, Tensor) else torch.device("cpu"),
    )
    if problem or q_dims is None or k_dims is None:
        return site
    _classify(site, q_dims, k_dims, grid)
    _check_eligible(site)
    return site


def _folded_heads(dims: Dims | None) -> int | None:
    """Heads folded into the batch: the last axis of the first dimension, if static."""
    if dims is None or len(dims[0]) != 1 or len(dims[0][0]) < 2:
        return None
    size = dims[0][0][-1].size
    return size if isinstance(size, int) else None


def _classify(site: Site, q_dims: Dims, k_dims: Dims, grid: Grid | None) -> None:
    """Fill in kind, grid and text from the token dimensions."""
    tokens: Dim = q_dims[-2]
    site.kind, site.reason = classify.kind_of(tokens, k_dims[-2])
    if not same(site.query_length, site.key_length) or site.kind in ("cross", "other"):
        if site.kind == "self":
            site.kind = "other"
        site.reason = site.reason or "its queries and keys differ in number"
        return
    lattice, note = classify.largest_lattice(tokens)
    if lattice is not None and classify.outside_tokens(q_dims[:-2], lattice):
        site.kind = "other"
        site.reason = "attends within frames or windows, not over every video token"
        return
    if grid is not None and _use_given(site, tokens, lattice, grid):
        return
    if lattice is not None:
        site.grid = lattice.grid
        sources = lattice.sources()
        if sources is None or not lattice.axes:
            site.reason = "its grid is dynamic and no tensor of the graph has its extents"
            return
        site.grid_sources = sources
        _set_text(site, lattice)
        site.reason = note or site.reason
        return
    _plain_sequence(site, tokens, q_dims, note)


def _set_text(site: Site, lattice: classify.Lattice) -> None:
    site.text_before = sum(classify.segment_size(s) for s in lattice.before)
    site.text_after = sum(classify.segment_size(s) for s in lattice.after)
    site.text_before_source = classify.text_source(lattice.before)


def _use_given(site: Site, tokens: Dim, lattice: classify.Lattice | None, grid: Grid) -> bool:
    """Take the user's grid where it accounts for the site's video tokens."""
    count = grid[0] * grid[1] * grid[2]
    if lattice is not None:
        if not same(classify.segment_size(lattice.atoms), count):
            return False
        _set_text(site, lattice)
    else:
        sizes = [classify.segment_size(s) for s in tokens]
        at = [i for i, size in enumerate(sizes) if same(size, count)]
        if len(at) != 1:
            site.notes.append(f"the given grid {grid} does not account for its tokens")
            return False
        site.text_before = sum(sizes[: at[0]])
        site.text_after = sum(sizes[at[0] + 1 :])
        site.text_before_source = classify.text_source(tokens[: at[0]])
    site.grid, site.grid_sources = grid, grid
    site.notes.append("grid as given")
    return True


def _plain_sequence(site: Site, tokens: Dim, q_dims: Dims, note: str) -> None:
    """No lattice in the token dimension: a grid from elsewhere in the graph, or a sequence."""
    axis = classify.single_axis(tokens)
    inputs = axis.axis[0] if axis is not None and axis.axis is not None else None
    outer = [a for d in q_dims[:-2] for s in d for a in s]
    if inputs is not None and any(
        a.axis is not None and a.axis[0] == inputs and a.axis[1] > 0 and not same(a.size, 1)
        for a in outer
    ):
        site.kind = "other"
        site.reason = "attends along one axis of the input only, not over every token"
        return
    candidates = classify.merges_of(site.graph.graph, site.query_length)
    if len(candidates) == 1 and site.kind == "self":
        site.grid = next(iter(candidates))
        site.grid_sources = site.grid
        site.notes.append("grid from a reshape elsewhere in the graph")
        return
    if axis is not None and not candidates:
        site.grid = (1, 1, axis.size)
        known = isinstance(axis.size, int)
        last = axis.size if known else SizeSource(*axis.source) if axis.source else None
        if last is not None:
            site.grid_sources = (1, 1, last)
            site.reason = "a plain sequence"
            return
        site.grid = None
    if len(candidates) > 1:
        note = f"several grids are possible ({sorted(candidates)[:3]}); pass grid=(t, h, w)"
    site.reason = f"{note or site.reason}; pass grid=(t, h, w) if it has one"


def _check_eligible(site: Site) -> None:
    """Decide eligibility once kind and grid are known; the reason says what is in the way."""
    match = site.match
    if site.kind not in ("self", "joint") or site.grid is None or not site.grid_sources:
        return
    if not same(site.query_length, site.key_length):
        return
    if match.reason:
        site.reason = match.reason
        return
    if site.text_before_source is None:
        site.reason = "the length of the text before its video tokens is not named in the graph"
        return
    if match.mask is not None:
        count = site.grid[0] * site.grid[1] * site.grid[2]
        problem = honours(match.mask, site.text_before, count)
        if problem:
            site.reason = problem
            return
        site.key_mask = not always_true(match.mask)
    site.eligible = True


def site_name(node: fx.Node) -> str:
    """Path of the module that computes a node, as model.get_submodule takes it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "model"
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\[['\"]self['\"]\]", "", path)
    path = path.replace("__dict__", "")
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    parts = [p for p in path.split(".") if p and p not in ("_modules", "_orig_mod", "L", "self")]
    return ".".join(parts) or "model"


def _make_unique(sites: list[Site]) -> None:
    """A second attention of one module is told apart by #1, a third by #2."""
    seen: Counter[str] = Counter()
    for site in sites:
        count = seen[site.name]
        seen[site.name] += 1
        if count:
            site.name = f"{site.name}#{count}"
