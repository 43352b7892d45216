"""Constants of the split, shared by the definition, the kernels and everything built on them.

They are part of the mathematics (docs/design/mathematics.md), not tuning knobs: changing one
changes what a plan's budgets mean, so `SPLIT_VERSION` must be raised with them.
"""

from __future__ import annotations

from typing import Final

SPLIT_VERSION: Final = 4
"""Version of the definition; stored in every plan and checked on load."""

KEY_BLOCK: Final = 64
"""Consecutive keys, in token order, that share one low-band summary."""

QUERY_TILE: Final = 128
"""Consecutive queries, in token order, that share one route."""

SUB_BLOCK: Final = 8
"""Keys per mid-band summary; kernels and exports have no mid band and attend its pairs exactly."""

SUB_TILE: Final = 8
"""Queries pooled for one routing score; a tile joins its sub-tiles by their rms."""

MID_RATIO: Final = 0.25
"""With the mid band on, pairs scoring in [MID_RATIO * threshold, threshold) go to it."""

SMALLEST_CHUNK: Final = 256
"""Fewest tokens of a chunk that is ordered by content; all sizes are powers of two."""

ALL: Final = 1 << 30
"""The chunk that holds all tokens, however many there are."""

DEFAULT_CHUNK: Final = 1024
"""Tokens of the chunks where none are named: most of what ordering all gains, at half its time."""

DEFAULT_PROBES: Final = 64
"""Queries per head attended exactly in every call, to unbias the split and to measure its error."""

DEFAULT_DENSITY: Final = 0.25
"""Fraction of (tile, block) pairs kept exact where there is no plan: a cautious choice."""
