"""Bounds the memory of a call: which heads, and of long sequences which tiles, go together."""

from __future__ import annotations

from collections.abc import Iterator

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_TILE

WORKSPACE = 2 << 30
"""Bytes of ordered keys and values, scores, routes and lists that a call may hold at once.

Heads enough to need more fill a GPU several times over, so taking them in turns costs no time.
"""

PAIR_BYTES = 11
"""Of one (query tile, key block) pair: score 4, mass term 2, route 1, exact list 4."""


LONG_TOKENS = 262_144
"""Video tokens from which a sequence is long: its query tiles go through one workspace in chunks,
its keys and values are read where they are, and its route is returned four pairs to a byte.

Below, pairs of tiles and blocks take less than the keys and values do, and one launch for all
tiles and keys in order are faster.
"""

LONG_PAIR_BYTES = 6
"""Of a pair in a chunk: score, then exact list in its place, 4; mass term 2. Pooled queries beside
it, at most a fifth of that, are gone before the attention."""

CHUNK_SHARE = 0.2
"""Bytes of a chunk's pairs, as a share of those of the keys and values."""


def is_long(tokens: int) -> bool:
    """Whether so many video tokens are a long sequence."""
    return tokens >= LONG_TOKENS


def bytes_per_key_head(
    tokens: int, queries: int, head_dim: int, itemsize: int, group_size: int
) -> int:
    """Workspace of one key head and the `group_size` query heads that share it.

    tokens, queries: video tokens among the keys and among the queries.
    """
    tiles, blocks = -(-queries // QUERY_TILE), -(-tokens // KEY_BLOCK)
    ordered = 2 * blocks * KEY_BLOCK * head_dim * itemsize
    if is_long(tokens):
        return int(CHUNK_SHARE * ordered)
    # Of a tile: pairs, mean queries of its sub-tiles and its mean squared query.
    pooled = (QUERY_TILE // SUB_TILE + 1) * head_dim * itemsize
    return ordered + group_size * tiles * (blocks * PAIR_BYTES + pooled)


def chunk_tiles(
    tokens: int, queries: int, head_dim: int, itemsize: int, group_size: int, processors: int = 1
) -> int:
    """Query tiles per head that go together in a long sequence.

    A multiple of the GPU's processors where there are more: the last round of programs is then as
    full as the others.
    """
    tiles, blocks = -(-queries // QUERY_TILE), -(-tokens // KEY_BLOCK)
    room = bytes_per_key_head(tokens, queries, head_dim, itemsize, group_size)
    fitting = max(room // (group_size * blocks * LONG_PAIR_BYTES), 1)
    if fitting > processors:
        fitting -= fitting % processors
    return min(fitting, tiles)


def turns(
    batch: int, kv_heads: int, per_head: int, workspace: int | None = None
) -> Iterator[list[tuple[slice, slice]]]:
    """Slices of the batch and of its key heads that fit the workspace, at least one head each.

    One list for each slice of the batch. workspace: in bytes; WORKSPACE without it.
    """
    heads = max((WORKSPACE if workspace is None else workspace) // per_head, 1)
    items, heads = max(heads // kv_heads, 1), min(heads, kv_heads)
    for item in range(0, batch, items):
        rows = slice(item, min(item + items, batch))
        yield [(rows, slice(h, min(h + heads, kv_heads))) for h in range(0, kv_heads, heads)]
