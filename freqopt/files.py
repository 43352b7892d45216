"""Where freqopt keeps files between runs: one folder, which one variable moves.

Measured launches and built operator libraries lie there. Deleting the folder loses nothing that is
not made again.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import platformdirs

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$FREQOPT_CACHE, or `freqopt` in the user's cache folder; it need not exist.

    The user's cache folder is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on a Mac.
    """
    old = os.environ.get("FREQOPT_CACHE_DIR")
    if old:
        _tell_new_name()
    given = os.environ.get("FREQOPT_CACHE") or old
    if given:
        return Path(given).expanduser()
    return platformdirs.user_cache_path("freqopt", appauthor=False)


@functools.cache
def _tell_new_name() -> None:
    logger.warning(
        "FREQOPT_CACHE_DIR is now called FREQOPT_CACHE: set that one instead; the old name is read "
        "until version 0.4"
    )
