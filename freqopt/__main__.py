"""`python -m freqopt`: the command line; without arguments, what works on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

INTERRUPTED = 130


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, which takes seconds to import: Ctrl-C meanwhile is one line too."""
    try:
        from freqopt.cli.app import main

        main(arguments)
    except KeyboardInterrupt:
        print("freqopt: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    command(sys.argv[1:] or ["doctor"])
