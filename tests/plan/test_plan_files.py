"""A plan by its path: what is in the file now, whatever kind of file it is, shown without harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_plans import full_plan

from freqopt.errors import FileError, PlanError
from freqopt.files import locked
from freqopt.options import load_plan
from freqopt.plan import plan_file as plans
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans, read_plans
from freqopt.shown import say, shown, shown_lines


def test_another_file_under_one_name_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept by relative path and time, a plan of one folder was taken for that of another."""
    for index, folder in enumerate(("a", "b")):
        full_plan().model_copy(update={"seed": index}).save(tmp_path / folder / "plan.json")
        os.utime(tmp_path / folder / "plan.json", ns=(0, 0))
    found = []
    for folder in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / folder)
        found.append(load_plan("plan.json"))
    assert [plan.seed for plan in found] == [0, 1, 0]
    assert found[0] is found[2], "parsed once"


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices have names on POSIX only")
def test_only_regular_files_of_some_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe hung for ever, an endless device took all memory."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(plans, "MAX_FILE_BYTES", 1000)
    full_plan().save(tmp_path / "plan.json")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "plan.json"):
        for load in (Plan.load, Plans.load, load_plan):
            with pytest.raises(PlanError, match="cannot read the plan"):
                load(path)


@pytest.mark.skipif(not os.path.isfile("/proc/self/mem"), reason="a file that cannot be read")
def test_a_file_that_cannot_be_read_is_said() -> None:
    with pytest.raises(PlanError, match="cannot read the plan /proc/self/mem"):
        read_plans("/proc/self/mem")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + "/y", "a\0b", "\udc80/y/z"])
def test_no_name_is_too_odd(name: str, tmp_path: Path) -> None:
    for load in (Plan.load, Plans.load, read_plans, Plan.from_pretrained, Plans.from_pretrained):
        with pytest.raises(PlanError):
            load(name)  # type: ignore[operator]
    if "\udc80" in name:
        return
    for save in (full_plan().save, full_plan().save_pretrained):
        with pytest.raises(FileError, match="cannot write"):
            save(tmp_path / name)


def test_a_lock_has_a_name_too() -> None:
    with pytest.raises(FileError, match="no name of a file"), locked("a\0b"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="pipes have names on POSIX only")
def test_a_page_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(FileError, match="it is a pipe"):
        full_plan().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["README.md"]


def test_names_do_not_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x07\nb\u202e\ud800"
    assert shown(name) == r"a\x1b[2J\x07\nb\u202e\ud800"
    assert len(shown("x" * 10_000)) == 500
    assert shown_lines("a\n\x1b") == "a\n\\x1b"
    plan = full_plan()
    sites = {name: plan.sites["blocks.0.attn"]}
    evidence = plan.evidence.model_copy(update={"sites": {}, "notes": [name]})
    text = str(plan.model_copy(update={"sites": sites, "evidence": evidence}))
    assert "\x1b" not in text and "\\x1b[2J" in text
    say(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_a_terminal_of_ascii_gets_escapes() -> None:
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("\u00e9 \u2192", file=stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9 \\u2192\n"  # type: ignore[attr-defined]
