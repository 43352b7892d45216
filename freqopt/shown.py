"""Text of others as it may be shown: names in plans and files do not command a terminal.

A name may hold escape sequences, line ends, marks that turn the direction of what follows, or
halves of characters that no terminal can be sent. Here they are seen as what they are.
"""

from __future__ import annotations

import sys
from typing import TextIO

LONGEST = 500
"""Characters of a name that are shown; a line of a file may have millions."""


def shown(name: object) -> str:
    """A name in one line, with what is not printable as escapes, and not without end."""
    text = str(name)
    cut = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def shown_lines(text: object) -> str:
    """Text of several lines, each as by `shown`, of any length."""
    lines = str(text).split("\n")
    return "\n".join(
        "".join(c if c.isprintable() or c == "\t" else _escaped(c) for c in line) for line in lines
    )


def shown_arguments(arguments: list[str]) -> list[str]:
    """A command's arguments but `--out FOLDER`, which is of one machine."""
    if "--out" not in arguments:
        return arguments
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print text; what the terminal's encoding lacks is printed as escapes too."""
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = shown_lines(text).encode(encoding, "backslashreplace").decode(encoding)
    print(safe, file=stream)
