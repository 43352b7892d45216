"""A C++ compiler that compiles no source twice in a run of the tests: $CXX of those of exports.

Most of what is built is the same few sources with other kernels beside them, and reading the
system's headers is most of the time. Objects are found again by the content of all that they are
made of; what is linked of them is what the compiler makes of all sources in one command.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

INCLUDED = re.compile(rb'^\s*#\s*include\s*["<]([^">]+)', re.MULTILINE)


def write_compiler(folder: Path, compiler: str) -> Path:
    """A program that compiles as `compiler` does and keeps its objects in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "c++"
    command = f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "{folder}" "{compiler}" "$@"\n'
    partial = folder / f"c++.{os.getpid()}"
    partial.write_text(command)
    partial.chmod(0o755)
    os.replace(partial, program)  # another worker may be running it
    return program


def main(folder: Path, compiler: str, words: Sequence[str]) -> int:
    """Compile the sources among the words one by one, then link; the compiler's exit status."""
    behind = {at + 1 for at, word in enumerate(words) if word in ("-o", "-include")}
    sources = [at for at, x in enumerate(words) if x.endswith(".cc") and at not in behind]
    if {"-c", "-E", "-S"} & set(words):
        sources = []  # nothing to link
    targets = {at + by for at, word in enumerate(words) if word == "-o" for by in (0, 1)}
    passed = [
        word
        for at, word in enumerate(words)
        if not (at in sources or at in targets or word.startswith("-l") or word.endswith(".S"))
    ]
    linked = list(words)
    for at in sources:
        status, linked[at] = compiled(folder, [compiler, *passed], words[at])
        if status:
            return status
    return subprocess.run([compiler, *linked], check=False).returncode


def compiled(folder: Path, command: Sequence[str], source: str) -> tuple[int, str]:
    """The compiler's exit status, and the object of a source."""
    places = [Path(word[2:]) for word in command if word.startswith("-I")]
    forced = [Path(command[at + 1]) for at, word in enumerate(command) if word == "-include"]
    files = {path: path.read_bytes() for path in read_by([*forced, Path(source)], places)}
    text = b"".join(files.values())
    options = [
        word
        for word in command[1:]
        if not word.startswith(("-I", "/"))  # their content counts, wherever it lies
        and (not word.startswith("-D") or word[2:].partition("=")[0].encode() in text)
    ]
    digest = hashlib.sha256(repr((command[0], options)).encode())
    for path, content in files.items():
        digest.update(repr((path.name, len(content))).encode() + content)
    made = folder / f"{digest.hexdigest()[:32]}.o"
    if made.exists():
        return 0, str(made)
    partial = folder / f"{os.getpid()}.o"
    done = subprocess.run([*command, "-c", source, "-o", str(partial)], check=False)
    if not done.returncode:
        os.replace(partial, made)
    return done.returncode, str(made)


def read_by(paths: Sequence[Path], places: Sequence[Path]) -> Iterator[Path]:
    """The files and what they include, but for the system's headers."""
    left, seen = list(paths), set[Path]()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        for name in INCLUDED.findall(path.read_bytes()):
            found = [place / name.decode() for place in (path.parent, *places)]
            left += [each for each in found if each.is_file()][:1]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
