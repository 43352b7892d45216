"""Lines for the user: seen without any logging set up, and silenced by the logger `freqopt`."""

from __future__ import annotations

import logging
import sys

from freqopt.shown import say, shown_lines

logger = logging.getLogger("freqopt")


def tell(message: str) -> None:
    """Say what is as it should be, once a model: at level INFO of the logger `freqopt`.

    Python shows nothing below WARNING unless told to, so where nobody has set a level it is
    printed to standard error. ``logging.getLogger("freqopt").setLevel("WARNING")`` silences it.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("freqopt: %s", shown_lines(message))
    elif logger.level == logging.NOTSET and logging.getLogger().level == logging.WARNING:
        say(f"freqopt: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """Say what is not as it should be."""
    logger.warning("freqopt: %s", shown_lines(message))
