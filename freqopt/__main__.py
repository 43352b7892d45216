"""`python -m freqopt`: the command line; without arguments, what works on this machine."""

from __future__ import annotations

import sys

from freqopt.cli.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
