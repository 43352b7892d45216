"""The page of environment variables lists what the sources read; the cache folder obeys them."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from freqopt import files

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "environment.md"
FOLDERS = ("freqopt", "passes", "kernels", "exporters", "models_zoo", "benchmarks", "examples")


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (ROOT / folder).rglob("*.py")


def read_by_python(source: str) -> set[str]:
    """Names that a module asks the environment for; a name that is not a literal fails."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        name: ast.expr | None = None
        match node:
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[name, *_]):
                pass
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="environ"), attr=method),
                args=[name, *_],
            ):
                assert method in ("get", "pop", "setdefault"), method
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name, ctx=ast.Load()):
                pass
            case ast.Compare(left=name, comparators=[ast.Attribute(attr="environ")]):
                pass
            case _:
                continue
        assert isinstance(name, ast.Constant), f"not a literal: {ast.unparse(node)}"
        found.add(str(name.value))
    return found


def read_by_sources() -> set[str]:
    found = set()
    for file in [*python_files(*FOLDERS), ROOT / ".ci" / "make_venv.py"]:
        found |= read_by_python(file.read_text())
    for folder in FOLDERS:
        for pattern in ("*.cc", "*.h"):
            for file in (ROOT / folder).rglob(pattern):
                found |= set(re.findall(r'getenv\("(\w+)"\)', file.read_text()))
    return found


def listed(section: str) -> set[str]:
    """Variables in the table of one section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return set(re.findall(r"^\| `(\w+)` \|", text, re.M))


@pytest.mark.smoke
def test_the_page_lists_exactly_what_the_sources_read() -> None:
    assert listed("Of freqopt") == read_by_sources()


def test_the_page_lists_exactly_what_make_reads() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert listed("Of make") == set(re.findall(r"^(\w+) \?=", makefile, re.M))


def test_the_page_lists_exactly_what_the_tests_read() -> None:
    read = {name for f in python_files("tests") for name in read_by_python(f.read_text())}
    assert listed("Of the tests") == read - listed("Of freqopt")


@pytest.mark.parametrize(
    "line",
    [
        'os.environ["X"]',
        'os.environ.get("X", 1)',
        'os.getenv("X")',
        '"X" in os.environ',
        'os.environ.pop("X", None)',
    ],
)
def test_every_way_of_reading_is_seen(line: str) -> None:
    assert read_by_python(f"import os\nfound = {line}") == {"X"}


def test_a_computed_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="not a literal"):
        read_by_python("import os\nos.environ.get(name)")
    assert read_by_python('import os\nos.environ["TRITON_INTERPRET"] = "1"') == set()


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FREQOPT_CACHE", "FREQOPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    files._tell_new_name.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of Linux")
def test_the_cache_lies_where_the_system_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "freqopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "freqopt"
    assert not list(tmp_path.iterdir()), "asking makes no folder"


def test_one_variable_moves_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = files.cache_folder()
    monkeypatch.setenv("FREQOPT_CACHE", "")
    assert files.cache_folder() == default
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FREQOPT_CACHE", "~/kept")
    assert files.cache_folder() == tmp_path / "kept"


def test_the_former_name_is_read_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FREQOPT_CACHE_DIR", str(tmp_path / "old"))
    with caplog.at_level(logging.WARNING):
        assert [files.cache_folder() for _ in range(2)] == [tmp_path / "old"] * 2
        monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "new"))
        assert files.cache_folder() == tmp_path / "new"
    (record,) = caplog.records
    assert "set that one instead" in record.message and "FREQOPT_CACHE:" in record.message
    assert "\n" not in record.message


def test_both_kinds_of_files_lie_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    import torch

    from freqopt.exporters.onnx import library as ort_library
    from freqopt.kernels import tuned

    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "cache"))
    assert tuned.file_of(torch.device("cpu")).parent == tmp_path / "cache"
    built: list[Path] = []

    def pretend(command: list[str], target: Path) -> None:
        built.append(target)
        target.parent.mkdir(parents=True)
        target.write_bytes(b"")

    monkeypatch.setattr(ort_library, "_compile", pretend)
    monkeypatch.setattr(ort_library, "compiler", lambda: "c++")
    ort_library.build_library(tmp_path / "artifact", [])
    assert built[0].is_relative_to(tmp_path / "cache" / "ort")


def test_a_user_without_a_home_goes_on_with_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one "~/.cache" is a folder of that name, here."""

    def unknown(*given: object) -> None:
        raise KeyError("no passwd entry")

    pwd = pytest.importorskip("pwd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files._private_folder.cache_clear()
    found = files.cache_folder()
    assert found.is_absolute() and found.parent == tmp_path and found == files.cache_folder()
    assert len(caplog.records) == 1 and "set FREQOPT_CACHE" in caplog.text
    monkeypatch.setenv("FREQOPT_CACHE", "~/kept")
    assert files.cache_folder().is_absolute()
    files._private_folder.cache_clear()


def test_a_launch_does_not_want_for_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every first launch reads the file of measured launches, whatever is there."""
    pytest.importorskip("triton")
    import torch

    from freqopt.errors import FileError
    from freqopt.kernels import tuned

    device = torch.device("cpu")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "x", tmp_path / "nothing", Path("/dev/null/x")):
        monkeypatch.setenv("FREQOPT_CACHE", str(folder))
        assert tuned.read_choices(device) == {}
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(FileError, match="cannot write"):
        tuned.keep_choice(device, torch.float16, 64, "up to 8192", {"warps": 4})
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path))
    path, owner = tuned.file_of(device), json.dumps(tuned.made_for(device))
    bad = ("4.0", "true", "[4]", "1e400", "4}, 5: {", "[" * 100_000, '"4"', "null")
    for choices in ('{"a": [4]}', "[]", "3", *(f'{{"a": {{"warps": {value}}}}}' for value in bad)):
        path.write_text(f'{{"made_for": {owner}, "choices": {choices}}}')
        assert tuned.read_choices(device) == {} and "cannot be used" in caplog.text
        caplog.clear()
    path.unlink()
    os.mkfifo(path)
    assert tuned.read_choices(device) == {} and "cannot be used" in caplog.text


def test_processes_that_tune_keep_each_others_choices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two used to keep 75 of 120: each wrote back what it had read before the other wrote."""
    pytest.importorskip("triton")
    import torch

    from freqopt.kernels import tuned

    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path))
    device = torch.device("cpu")

    def tune(first: int) -> None:
        for dim in range(first, first + 30):
            tuned.keep_choice(device, torch.float16, dim, "up to 8192", {"warps": 4})

    threads = [threading.Thread(target=tune, args=(30 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tuned.read_choices(device)) == 90


def test_a_child_does_not_search_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from freqopt.exporters.child import run_module

    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "freqopt").mkdir()
    (tmp_path / "freqopt" / "__init__.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = run_module("freqopt.config", tmp_path, "")
    assert done.returncode == 0 and "hijacked" not in done.stderr, done.stderr
