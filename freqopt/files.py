"""How files are read and written: whole or not at all, of bounded size, and where they are kept.

What is read may come from a stranger, so only regular files are opened and none that is larger than
its kind ever is. What is written appears under its name when it is complete and on the disk. Files
that are kept between runs lie in one folder, which one variable moves; deleting it loses nothing
that is not made again.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from freqopt.errors import FileError, OptionError

logger = logging.getLogger(__name__)

LOCK_SECONDS = 60.0
"""How long to wait for another process that writes the same file, which takes a second or less."""


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe, a device), or is larger.
    """
    check_regular(path, limit)
    # Not blocking: it may have become a pipe since.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise _too_large(path, len(content), limit)
    return content


def check_regular(path: str | os.PathLike[str], limit: int | None = None) -> None:
    """Refuse what is no regular file, or larger than `limit` bytes, before it is opened.

    Raises:
        OSError: it is that, or cannot be looked at.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a null byte in the name
        raise OSError(22, f"not a name of a file ({error})", os.fspath(path)) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise OSError(22, f"it is {kind}; a regular file is supported", os.fspath(path))
    if limit is not None and found.st_size > limit:
        raise _too_large(path, found.st_size, limit)


def _too_large(path: str | os.PathLike[str], size: int, limit: int) -> OSError:
    return OSError(27, f"it has {size} bytes or more; up to {limit} are supported", os.fspath(path))


def hash_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file, hexadecimal.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_path(path: object, name: str = "path") -> None:
    """Refuse what is no path of a file or folder. name: of the argument.

    Raises:
        OptionError: it is of another kind, or empty, which would be the folder one is in.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise OptionError(f"{name} is {path!r}; the path of a file or folder is needed")


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where a file is, or will be, that is to be written; links are followed.

    Raises:
        FileError: no file can be called that.
        OptionError: it is no path.
    """
    check_path(path)
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a null byte, or half of a character
        raise FileError(f"cannot write {os.fspath(path)!r}: no name of a file ({error})") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file beside `path` to write, which takes its place when the block ends well.

    Until then `path` is what it was; afterwards the new content is on the disk. The new file's name
    is nobody else's: any number of threads and processes may write one path, the last one wins.
    A link is followed.

    Raises:
        FileError: it cannot be written.
    """
    target = real_path(path)
    partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        if target.is_dir():
            raise OSError(21, "it is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the folder's entries reach the disk, where the system can be asked to."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file, text as UTF-8; an existing one is replaced only by a complete one.

    Halves of characters, which JSON from a stranger may hold, are written as escapes.

    Raises:
        FileError: it cannot be written.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only process that reads `path`, changes it and writes it, while the block runs.

    Raises:
        FileError: the lock beside it cannot be made, or another holds it for a minute.
    """
    import filelock

    target = real_path(path)
    lock = filelock.FileLock(target.with_name(f".{target.name[:200]}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout as error:
        raise FileError(
            f"{path} is being written by another process for {LOCK_SECONDS:g} s; try again, or "
            f"delete {lock.lock_file} if there is none"
        ) from error
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Try to write beside `path`, so that hours of work do not end in a full or foreign folder.

    Raises:
        FileError: it cannot be written.
    """
    target = real_path(path)
    try:
        if target.is_dir():
            raise OSError(21, "it is a folder; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent) as stream:
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def cache_folder() -> Path:
    """$FREQOPT_CACHE, or `freqopt` in the user's cache folder; it need not exist.

    The user's cache folder is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on a Mac.
    Where there is none, as for a user without a home, a folder that this process alone has.
    """
    old = os.environ.get("FREQOPT_CACHE_DIR")
    if old:
        _tell_new_name()
    given = os.environ.get("FREQOPT_CACHE") or old
    if given:
        # Not Path.expanduser, which raises where a home is not known.
        return Path(os.path.expanduser(given)).absolute()
    try:
        found = Path(platformdirs.user_cache_path("freqopt", appauthor=False))
    except (RuntimeError, KeyError):  # newer versions say so, older ones give "~/.cache" back
        return _private_folder()
    return found if found.is_absolute() else _private_folder()


@functools.cache
def _private_folder() -> Path:
    logger.warning(
        "there is no home folder, so measured launches and built libraries are kept for this "
        "process only; set FREQOPT_CACHE to a folder that is yours"
    )
    try:
        made = tempfile.mkdtemp(prefix="freqopt-")
    except OSError:
        return Path(os.devnull, "freqopt")  # nothing is ever found or written there
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@functools.cache
def _tell_new_name() -> None:
    logger.warning(
        "FREQOPT_CACHE_DIR is now called FREQOPT_CACHE: set that one instead; the old name is read "
        "until version 0.4"
    )
