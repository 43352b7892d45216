"""The launches of a split, declared once; see `freqopt.kernels.launches`."""

from __future__ import annotations

import functools

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_TILE
from freqopt.kernels.launches import Bound, KernelLaunch, bind
from freqopt.kernels.portable import attend, density, glue, long, prepare, ridge, score
from freqopt.kernels.tiles import Launch, padded_dim

GROUP = 4
"""Key blocks per program of the summaries. One warp each: a block's sums then stay inside a warp;
between warps they go through shared memory, and waiting for that took more time than the reading.
"""

H_BAR_GROUP = 32
"""Key blocks per program of the first-order products: amortises their (D, D) sum."""

TOTAL_COLS = 32
"""Channels per program of a head's sums, which so spread over more of the GPU."""

RIDGE_COLS = 64
"""Channels at a time of the first-order matrix, whose products then have as many as it has probes.
"""

ROUTE_BLOCKS = 512
"""Key blocks per step of the routing. With two warps, 0.06 ms of 24 heads x 75,600 tokens, where
1,024 and four took 0.08."""

LONG_ROUTE_BLOCKS = 1024
"""The same of a long sequence's routing."""

DENSITY_CELLS = 8192
"""Scores per step of the search for a density's threshold, in exports: 16 to a thread."""

RANK_CELLS = 4096
"""The same of one of its passes in PyTorch."""

PROBE_PROGRAMS = 264
"""Programs that the probe's exact pass is spread over, by cutting the keys into ranges: twice the
processors of an H200, where 132, 396, 512 and 1,056 were slower."""

MAX_PARTS = 64
"""Most key ranges of one head: their partial sums have to be merged."""

POOLED_TILES = int(score.LANES.value)
"""Tiles whose pooled queries lie together."""

DERIVED = {
    "blocks": ("tokens", KEY_BLOCK),
    "tiles": ("queries", QUERY_TILE),
    "groups": ("blocks", GROUP),
    "spans": ("blocks", H_BAR_GROUP),
    "pools": ("tiles", POOLED_TILES),
    "probe_units": ("probes", int(glue.UNIT.value)),
    "block_units": ("blocks", int(glue.UNIT.value)),
}
"""Extents that are others cut into parts, the last of them ragged: of what, and how large."""

SHAPES: dict[str, tuple[str | int, ...]] = {
    "limits": ("heads",),
    "key_out": ("kv_heads", "blocks", KEY_BLOCK, "dim"),
    "value_out": ("kv_heads", "blocks", KEY_BLOCK, "dim"),
    "key_mean": ("kv_heads", "blocks", "dim"),
    "key_var": ("kv_heads", "blocks", "dim"),
    "spread": ("kv_heads", "blocks"),
    "sums": ("kv_heads", "groups", 3, "dim"),
    "first_order": ("kv_heads", "spans", "dim", "dim"),
    "key_shift": ("kv_heads", "dim"),
    "head_spread": ("kv_heads", "shares"),
    "low_key": ("kv_heads", "blocks", "dim"),
    "low_value": ("kv_heads", "blocks", "dim"),
    "h_bar": ("kv_heads", "dim", "dim"),
    "sub_mean": ("heads", "pools", POOLED_TILES * QUERY_TILE // SUB_TILE, "dim"),
    "tile_square": ("heads", "tiles", "dim"),
    "score": ("heads", "tiles", "blocks"),
    "mass_term": ("heads", "tiles", "blocks"),
    "route": ("heads", "tiles", "blocks"),
    "exact_list": ("heads", "tiles", "blocks"),
    "counts": ("heads", "tiles"),
    "peak": ("heads", "parts", "probes"),
    "mass": ("heads", "parts", "probes", 2),
    "exact_out": ("heads", "parts", "probes", "dim"),
    "missing_out": ("heads", "parts", "probes", "dim"),
    "logit": ("heads", "probes", "blocks"),
    "term": ("heads", "probes", "blocks"),
    "moments": ("heads", "probe_units", "block_units", int(glue.MOMENTS.value)),
    "coefficients": ("heads", 2),
    "probe_energy": ("heads",),
    "matrix": ("heads", "dim", "dim"),
    "probe_error": ("heads",),
}
"""What the launches of `SPLIT` hand on, for one batch item. shares: `TOTAL_COLS` of the channels
each; parts: `key_ranges`."""


SIZE = {"D": "dim", "DP": "padded"}
DOTS = {**SIZE, "PRECISION": "precision"}
MASKED = {"HAS_MASK": "masked"}
ORDERED = {"key": "key_out", "value": "value_out", "text_key": "key", "text_value": "value"}
OF_QUERIES = {"tokens": "queries", "text_before": "query_before"}

SPLIT = (
    KernelLaunch(
        "summarise", prepare.summarise_kernel, "kv_pairs blocks/GROUP",
        {**SIZE, "GROUP": GROUP}, warps=1,
        writes="key_out value_out key_mean low_value key_var spread sums",
        passed={"heads": "kv_heads", "order": "key_order", "order_row": "key_order_row"},
    ),
    KernelLaunch(
        "total", glue.total_kernel, "padded/COLS kv_pairs",
        {**SIZE, "COLS": "columns", "ROWS": 128}, writes="key_shift head_spread",
    ),
    KernelLaunch(
        "centre", glue.centre_kernel, "blocks/BJ kv_pairs",
        {**SIZE, "COLS": "columns", "BJ": 32}, writes="low_key", rewrites="spread",
    ),
    KernelLaunch(
        "first", prepare.first_order_kernel, "blocks/GROUP kv_pairs",
        {**SIZE, "GROUP": H_BAR_GROUP}, "first_warps", "first_stages",
        writes="first_order", passed={"key": "key_out", "value": "value_out"},
    ),
    KernelLaunch(
        "h_bar", glue.h_bar_kernel, "cells/CELLS kv_pairs", {"CELLS": 1024},
        writes="h_bar", passed={"groups": "spans", "out": "h_bar"},
    ),
    KernelLaunch(
        "pool_tiles", score.pool_tiles_kernel, "pairs tiles", SIZE,
        writes="sub_mean tile_square", passed=OF_QUERIES,
    ),
    KernelLaunch(
        "disperse", score.disperse_kernel, "pairs tiles/BI blocks/BJ",
        {**DOTS, "BI": "disperse_side", "BJ": "disperse_side"}, writes="score mass_term",
    ),
    KernelLaunch(
        "score", score.score_kernel, "pairs tiles/TILES",
        {**DOTS, "TILES": "score_tiles", "BJ": "score_blocks", "WIDE": "score_wide"},
        "score_warps", "score_stages", rewrites="score",
    ),
    KernelLaunch("limits", glue.limits_kernel, "pairs", {}, warps=1, writes="limits",
                 when="threshold"),
    KernelLaunch("density", density.density_kernel, "pairs", {"CELLS": DENSITY_CELLS}, warps=16,
                 of_call={"OWN": True}, writes="limits", when="density"),
    KernelLaunch(
        "route", prepare.route_kernel, "tiles pairs", {}, warps=2,
        of_call={"BJ": ROUTE_BLOCKS, "OWN": True},
        writes="route exact_list counts", rewrites="mass_term", passed={"threshold": "limits"},
    ),
    KernelLaunch(
        "probe", attend.probe_kernel, "parts pairs probes/BP", {**DOTS, "BP": "probe_rows"},
        stages="probe_stages", of_call=MASKED, writes="peak mass exact_out missing_out",
        passed={**ORDERED, "peak_out": "peak", "mass_out": "mass"}, when="probes",
    ),
    KernelLaunch(
        "merge", glue.merge_kernel, "probes/BP pairs", {**SIZE, "BP": 4},
        rewrites="peak mass exact_out missing_out", when="probes",
    ),
    KernelLaunch(
        "estimate", glue.estimate_kernel, "blocks/BJ pairs probes/BP",
        {**DOTS, "BP": "fit_rows", "BJ": "fit_columns"}, writes="logit term moments",
        passed={"logit_out": "logit", "term_out": "term", "text_before": "query_before"},
        when="probes",
    ),
    KernelLaunch(
        "fit", glue.fit_kernel, "pairs",
        {**DOTS, "BP": "fit_rows", "BJ": "fit_columns", "ROWS": 128}, warps=8,
        writes="coefficients probe_energy", rewrites="mass exact_out missing_out",
        passed=OF_QUERIES, when="probes",
    ),
    KernelLaunch(
        "ridge", ridge.ridge_kernel, "pairs", {**DOTS, "BD": "ridge_columns"}, warps=4,
        writes="matrix probe_error", passed=OF_QUERIES,
    ),
    KernelLaunch(
        "attend", attend.attend_kernel, "queries/BM pairs", {**DOTS, "BM": "rows", "WIDE": "wide"},
        "warps", "stages", of_call={**MASKED, "TEXT": True, "RAGGED": True},
        writes="out", passed=ORDERED,
    ),
    KernelLaunch(
        "text", glue.text_kernel, "query_text/BM pairs", {**DOTS, "BM": "text_rows"},
        stages="stages", of_call=MASKED, rewrites="out", passed=ORDERED, when="query_text",
    ),
)  # fmt: skip
"""Of one call, in their order. Those of a density and of text are for exports: PyTorch has its own.
Kernels read whatever of their arguments they do not write."""

LISTED = (
    KernelLaunch("probe_tiles", glue.probe_tiles_kernel, "", {"ROWS": 64}, warps=1),
    KernelLaunch("route_tiles", long.route_tiles_kernel, "tiles pairs", {}, stages=3,
                 of_call={"BJ": LONG_ROUTE_BLOCKS}),
)  # fmt: skip
"""Of calls in PyTorch that route tiles of a list: those of the probes, or of a long sequence."""

RANKING = (
    KernelLaunch("histogram", density.histogram_kernel, "counters pairs", {"CELLS": RANK_CELLS},
                 warps=8, stages=3, of_call={"BITS": 8, "BELOW": 23, "FIRST": False}),
    KernelLaunch("narrow", density.narrow_kernel, "pairs", {}, stages=3,
                 of_call={"BITS": 8, "FIRST": False, "LAST": False}),
)  # fmt: skip
"""Of the search for a density's threshold in PyTorch, once for each of its passes."""


def key_ranges(pairs: int, blocks: int) -> int:
    """Ranges of keys that the probe's exact pass has programs for. pairs: heads of all items."""
    return max(min(PROBE_PROGRAMS // pairs, MAX_PARTS, blocks), 1)


def numbers_of(tiles: Launch, dim: int) -> dict[str, int | str]:
    """Numbers that these launches give by name. dim: of a head."""
    padded = padded_dim(dim)
    columns, of_ridge = (min(most, padded) for most in (TOTAL_COLS, RIDGE_COLS))
    return {
        **tiles._asdict(), "dim": dim, "padded": padded, "columns": columns,
        "ridge_columns": of_ridge,
    }  # fmt: skip


@functools.lru_cache(maxsize=64)
def launches_of(tiles: Launch, dim: int) -> dict[str, Bound]:
    """Those of a call in PyTorch, by name."""
    numbers = numbers_of(tiles, dim)
    return {launch.name: bind(launch, numbers) for launch in (*SPLIT, *LISTED)}
