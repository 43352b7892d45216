"""What was made for calls of one form, for as many forms as may be kept.

A model that is called at lengths that never come again has forms without end. Of more than may be
kept the one that was used longest ago is dropped, and made anew should it come again.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class Latest(Generic[Value]):
    """Values by key, those that were used last.

    most: how many are kept. what: names them in the line that is logged when one is dropped first.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self._held: dict[object, Value] = {}
        self._is_full = False

    def get(self, key: object) -> Value | None:
        """The value of a key, None if it has none (any more)."""
        try:
            found = self._held[key] = self._held.pop(key)
        except KeyError:
            return None
        return found

    def put(self, key: object, value: Value) -> Value:
        """Keep a value, and drop the one used longest ago if there are too many; returns it."""
        self._held[key] = value
        while len(self._held) > self.most:
            self._drop_oldest()
        return value

    def all(self) -> dict[object, Value]:
        """All values by key."""
        return dict(self._held)

    def clear(self) -> None:
        """Drop all."""
        self._held.clear()

    def _drop_oldest(self) -> None:
        if not self._is_full:
            self._is_full = True
            logger.info(
                "more than %d %s: the one used longest ago is dropped, and made anew if it comes "
                "again, which takes some milliseconds",
                self.most,
                self.what,
            )
        self._held.pop(next(iter(self._held), None), None)

    def __len__(self) -> int:
        return len(self._held)
