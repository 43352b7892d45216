"""Files are read only if they are regular and not too large, and written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from freqopt import files
from freqopt.errors import FileError
from freqopt.files import check_writable, locked, read_bounded, replacing, write_atomically


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert read_bounded(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="10 bytes or more; up to 9"):
        read_bounded(path, 9)
    (tmp_path / "link").symlink_to(path)
    assert read_bounded(tmp_path / "link", 10) == b"x" * 10


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices have names on POSIX only")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe would wait for ever, and a device need not end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="regular file"):
            read_bounded(path, 10)
    for path in (tmp_path / "nothing", Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(OSError):
            read_bounded(path, 10)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_new_files_have_the_usual_permissions_and_links_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    plain = tmp_path / "plain"
    plain.write_text("")
    (tmp_path / "link").symlink_to(path)
    write_atomically(tmp_path / "link", "content")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "content"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_in_its_place_is_said_in_one_line(tmp_path: Path) -> None:
    for write in (lambda p: write_atomically(p, "x"), check_writable):
        with pytest.raises(FileError, match="it is a folder") as caught:
            write(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / "file").write_text("")
        with pytest.raises(FileError, match=r"cannot write .*file/a"):
            write(tmp_path / "file" / "a")
    check_writable(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_threads_that_write_one_path_do_not_meet(tmp_path: Path) -> None:
    """Each used to write the file that was named after the process, and all but one failed."""
    path, failed = tmp_path / "a", []
    texts = [str(i) * 20_000 for i in range(8)]

    def write(text: str) -> None:
        try:
            for _ in range(20):
                write_atomically(path, text)
        except Exception as error:  # told by the assertion
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert path.read_text() in texts and os.listdir(tmp_path) == ["a"]


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    path, refused = tmp_path / "a", pytest.raises(FileError, match="written by another process")
    with locked(path), refused, locked(path):
        pass
    with locked(tmp_path / "a"):
        pass
