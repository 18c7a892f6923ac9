"""Every file operation of the package.

One small module, so that "fail the n-th operation" and "die at the n-th operation" can be tried at every n. Files are
written to a temporary name beside the target, synced, renamed; then the directory is synced. A reader sees the old
file or the new one.
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
    """Within, no other process has ``directory`` locked. The lock ends with its process, however that ends.

    On a network file system it holds between the processes of one machine.

    Raises:
        FileError: another process has it, or the file system has no locks.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
def naming(path: Path | str) -> Iterator[None]:
    """An ``OSError`` within names ``path``: that of a failed write names nothing, or a temporary file.

    Libraries in Rust (safetensors, tokenizers) have errors of their own for it, with the number in their words.
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
    """Yields a temporary path; what lies there when the block ends takes ``path``'s place, synced, in one rename.

    Raises:
        OSError: it cannot be written, and says why and where. What was there before is there still.
    """
    remove_leftovers(path.parent)
    with naming(path):
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
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside ``path`` that becomes ``path`` when the block ends without an error.

    Raises:
        FileError: ``path`` exists already and is not an empty directory, or does so when the block ends.
    """
    check_absent(path)
    made = missing_directories(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with removed_if_empty(made), naming(path):
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
    """Syncs everything in a temporary directory, and gives it the mode that a new directory has."""
    for entry in directory.rglob("*"):
        if entry.is_dir():
            sync_directory(entry)
        elif entry.is_file():
            sync_file(entry)
    sync_directory(directory)
    os.chmod(directory, 0o777 & ~_umask())


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` fills a new directory that then takes ``path``'s place; the old one is kept until the new one is whole.

    A crash between the two renames leaves the old one set aside; ``finish_replacing`` puts it back. An error there
    puts it back at once.
    """
    old = _set_aside(path)
    finish_replacing(path)
    with naming(path):
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
    """Hidden, and of a name that is nobody else's."""
    return path.with_name(f".mebp-old-{path.name}")


def locate_directory(path: Path) -> Path:
    """Where the content of a directory lies that ``replace_directory`` writes, or wrote when it was interrupted."""
    old = _set_aside(path)
    return old if old.exists() and not path.exists() else path


def finish_replacing(path: Path) -> None:
    """Finishes a ``replace_directory`` that was interrupted, and does so no longer."""
    old = _set_aside(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def missing_directories(path: Path) -> list[Path]:
    """``path`` and the directories above it that do not exist, the deepest first."""
    return [place for place in (path, *path.parents) if not place.exists()]


@contextmanager
def removed_if_empty(places: list[Path]) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first one that is not empty
            for place in places:
                place.rmdir()


def existing_parent(path: Path) -> Path:
    """The nearest directory at or above ``path`` that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def check_absent(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileError(f"{path} exists already: choose another place or remove it")


def append_line(path: Path, line: str) -> None:
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
