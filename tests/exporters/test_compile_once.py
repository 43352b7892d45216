"""The compiler of these tests makes what the real one does, and anew when anything changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from compile_once import write_compiler

from freqopt.exporters.onnx.library import compiler


def test_objects_are_made_anew_for_other_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)  # which is such a compiler
    objects = tmp_path / "objects"
    program = write_compiler(objects, compiler())

    def answer(folder: str, *options: str) -> int:
        target = tmp_path / folder / "out"
        sources = [str(tmp_path / folder / name) for name in ("main.cc", "other.cc")]
        command = [program, f"-I{tmp_path / folder}", *options, *sources, "-o", target]
        subprocess.run([str(word) for word in command], check=True)
        return subprocess.run([str(target)], check=False).returncode

    def write(folder: str, number: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "number.h").write_text(f"#define NUMBER {number}\n")
        (tmp_path / folder / "between.h").write_text("#include <number.h>\n")
        (tmp_path / folder / "main.cc").write_text("int other(); int main() { return other(); }")
        (tmp_path / folder / "other.cc").write_text(
            '#include "between.h"\n#ifndef MORE\n#define MORE 0\n#endif\n'
            "int other() { return NUMBER + MORE; }"
        )

    def count() -> int:
        return len(list(objects.glob("*.o")))

    write("a", 3)
    assert answer("a") == 3 and count() == 2
    write("b", 3)
    assert answer("b") == 3 and count() == 2, "where files lie does not matter"
    assert answer("b", "-DUNREAD=1") == 3 and count() == 2
    assert answer("b", "-DMORE=2") == 5 and count() == 3, "main.cc does not read it"
    assert answer("b", "-O1") == 3 and count() == 5
    write("a", 4)  # in a header of a header
    assert answer("a") == 4 and count() == 6


def test_what_does_not_compile_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.cc").write_text("int main() { return nothing; }")
    program = write_compiler(tmp_path / "objects", compiler())
    command = [str(program), str(tmp_path / "a.cc"), "-o", str(tmp_path / "out")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode and "nothing" in done.stderr and not (tmp_path / "out").exists()
