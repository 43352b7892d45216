"""Bounds the memory of a call: which heads go through the kernels together."""

from __future__ import annotations

from collections.abc import Iterator

from freqopt.config import KEY_BLOCK, QUERY_TILE

WORKSPACE = 2 << 30
"""Bytes of ordered keys and values, scores, routes and lists that a call may hold at once.

Heads enough to need more fill a GPU several times over, so taking them in turns costs no time.
"""

PAIR_BYTES = 11
"""Of one (query tile, key block) pair: score 4, mass term 2, route 1, exact list 4."""


def bytes_per_key_head(tokens: int, head_dim: int, itemsize: int, group_size: int) -> int:
    """Workspace of one key head and the `group_size` query heads that share it."""
    tiles, blocks = -(-tokens // QUERY_TILE), -(-tokens // KEY_BLOCK)
    ordered = 2 * blocks * KEY_BLOCK * head_dim * itemsize
    return ordered + group_size * tiles * blocks * PAIR_BYTES


def turns(
    batch: int, kv_heads: int, per_head: int, workspace: int = WORKSPACE
) -> Iterator[list[tuple[slice, slice]]]:
    """Slices of the batch and of its key heads that fit the workspace, at least one head each.

    One list for each slice of the batch.
    """
    heads = max(workspace // per_head, 1)
    items, heads = max(heads // kv_heads, 1), min(heads, kv_heads)
    for item in range(0, batch, items):
        rows = slice(item, min(item + items, batch))
        yield [(rows, slice(h, min(h + heads, kv_heads))) for h in range(0, kv_heads, heads)]
