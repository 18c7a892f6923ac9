"""Writes that survive a crash: a reader sees the old file or the new one, whenever the process dies.

A file is written under a temporary name beside its target, synced, and renamed; then its directory is synced. All
writes of the package go through this module, so that tests can fail, or die at, each operation in turn.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FileError
from .temporaries import TEMPORARY_PREFIX, remove_leftovers, temporary_prefix


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """While active, no other process can lock ``directory``. The lock ends with its process, however that ends.

    On a network file system it holds between the processes of one machine.

    Raises:
        FileError: another process has it, or the file system has no locks.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have replaced the directory since it was opened: the lock would be on the old one.
            free = os.path.samestat(os.fstat(handle), os.stat(directory))
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError as error:
            raise FileError(
                f"{directory} cannot be locked ({error.strerror}): choose a place on another file system"
            ) from None
        if not free:
            raise FileError(f"{directory} is in use by another process: wait for its end, or choose another place")
        yield
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def path_in_errors(path: Path | str) -> Iterator[None]:
    """While active, an ``OSError`` names ``path``: by itself a failed write names nothing, or a temporary file.

    Errors of libraries in Rust (safetensors, tokenizers), which give the number in their words, become ``OSError`` too.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and TEMPORARY_PREFIX not in f"{error.filename} {error.filename2}":
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """While active, the new content is written to the path that this yields; at the end it takes ``path``'s place.

    Raises:
        OSError: it cannot be written; the error says why and where. The old file, if any, is still there.
    """
    remove_leftovers(path.parent)
    with path_in_errors(path):
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(), dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            sync_file(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file, see ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """While active, the directory that this yields is filled; at the end, without an error, it becomes ``path``.

    Raises:
        FileError: ``path`` exists and is not an empty directory, at the beginning or at the end.
    """
    check_absent(path)
    made = missing_directories(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with removed_if_empty(made), path_in_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(), dir=path.parent))
        try:
            yield temporary
            _finish_directory(temporary)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileError(
                        f"{path} was made by another process meanwhile, and stays: choose another place or remove it"
                    ) from None
                raise
            sync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _finish_directory(directory: Path) -> None:
    """Syncs everything in a temporary directory, and gives it the mode of a new directory."""
    for entry in directory.rglob("*"):
        if entry.is_dir():
            sync_directory(entry)
        elif entry.is_file():
            sync_file(entry)
    sync_directory(directory)
    os.chmod(directory, 0o777 & ~_umask())


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Replaces the directory ``path`` by a new one that ``write`` fills; the old one stays until the new one is whole.

    No single rename replaces a directory that is not empty, so the old one is set aside first. A crash between the two
    renames leaves it there, and ``finish_replacing`` puts it back. An error between them puts it back at once.
    """
    old = _set_aside(path)
    finish_replacing(path)
    with path_in_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(), dir=path.parent))
        try:
            write(temporary)
            _finish_directory(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync_directory(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """The place where ``replace_directory`` keeps the old directory: a hidden name that nobody else uses."""
    return path.with_name(f".mebp-old-{path.name}")


def locate_directory(path: Path) -> Path:
    """Returns where the content of ``path`` lies: there, or where an interrupted ``replace_directory`` set it aside."""
    old = _set_aside(path)
    return old if old.exists() and not path.exists() else path


def finish_replacing(path: Path) -> None:
    """Tidies up after a ``replace_directory`` that was interrupted: the new directory stays, or the old comes back."""
    old = _set_aside(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def missing_directories(path: Path) -> list[Path]:
    """Returns ``path`` and the directories above it, as far as they do not exist; the deepest first."""
    return [place for place in (path, *path.parents) if not place.exists()]


@contextmanager
def removed_if_empty(places: list[Path]) -> Iterator[None]:
    """Removes the directories afterwards, up to the first that is not empty."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for place in places:
                place.rmdir()


def existing_parent(path: Path) -> Path:
    """The nearest directory at or above ``path`` that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def check_place(path: Path) -> None:
    """Raises FileError where ``path`` is no directory and cannot become one. Call it before any work for it is done."""
    whole = path.absolute()
    above = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
    if not above.is_dir():
        what = "a broken link" if above.is_symlink() else "no directory"
        below = "" if above == whole else f", so that {path} cannot be made in it"
        raise FileError(f"{path if above == whole else above} is {what}{below}: choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FileError(f"{path} cannot be made, {above} may not be written into: choose another place")


def check_absent(path: Path) -> None:
    """Raises FileError where ``path`` exists and is not an empty directory, or cannot be made; see ``check_place``."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileError(f"{path} exists already: choose another place or remove it")
    check_place(path)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a text file. It is not synced: a crash may lose the last lines, or cut the last one."""
    with path_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
