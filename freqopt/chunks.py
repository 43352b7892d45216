"""Sizes of the chunks that are ordered by content."""

from __future__ import annotations

from freqopt.config import ALL, SMALLEST_CHUNK
from freqopt.errors import InputError


def check_chunk(chunk: int | str) -> int:
    """Tokens of a chunk, `ALL` for "all".

    Raises:
        InputError: neither "all" nor a power of two from `SMALLEST_CHUNK` up.
    """
    if chunk == "all":
        return ALL
    if isinstance(chunk, int) and chunk >= SMALLEST_CHUNK and not chunk & (chunk - 1):
        return min(chunk, ALL)
    raise InputError(
        f"chunk {chunk!r}: a power of two from {SMALLEST_CHUNK} up, or 'all', is supported"
    )
