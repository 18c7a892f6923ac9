"""Every file operation of the package.

One small module, so that "fail the n-th operation" and "die at the n-th operation" can be tried at every n. Files are
written to a temporary name beside the target, synced, renamed; then the directory is synced. A reader sees the old
file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import platform
import re
import shutil
import stat
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

CHECKSUM_CHUNK = 1 << 20
SEAL = "seal"
HEADER_LIMIT = 1 << 26
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
DTYPES |= {"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPES |= {"F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
TEMPORARY_PREFIX = ".mebp-tmp-"
MADV_POPULATE_READ = 22  # Linux; Python has no name for it


class FileError(ValueError):
    """A file is missing, cut short, changed or not what it should be. The message is one line for the user."""


def _origin() -> str:
    """Names the machine, and its boot and container: 8 hexadecimal digits each.

    A process's number says nothing on another machine, after a reboot, or in another container: so they are told apart.
    """
    boot = []
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            boot.append(os.readlink(source) if source.endswith("/pid") else Path(source).read_text())
    return "".join(f"{zlib.crc32(text.encode()):08x}" for text in (platform.node(), " ".join(boot)))


def _temporary_prefix() -> str:
    """Of the names of temporaries: a later process can tell what a crash left behind."""
    return f"{TEMPORARY_PREFIX}{_origin()}-{os.getpid()}.{_started(os.getpid())}-"


def remove_leftovers(directory: Path) -> None:
    """Removes temporaries in ``directory`` whose process is no more; only those of this machine and container."""
    mine = _origin()
    for entry in directory.glob(f"{TEMPORARY_PREFIX}*"):
        origin, _, rest = entry.name[len(TEMPORARY_PREFIX) :].partition("-")
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if origin == mine:
                process, _, started = rest.partition("-")[0].partition(".")
                known = process.isdecimal()
                left = known and not (psutil.pid_exists(int(process)) and _started(int(process)) in ("", started))
            else:  # of an earlier boot, if it is this machine's and older than its start
                left = origin[:8] == mine[:8] and entry.lstat().st_mtime < psutil.boot_time()
            if left and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif left:
                entry.unlink()


def _started(process: int) -> str:
    """When a process began, in ticks since the boot: numbers are used again, and clocks are set. Empty if not known."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


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
def _written(path: Path | str) -> Iterator[None]:
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
    with _written(path):
        handle, name = tempfile.mkstemp(prefix=_temporary_prefix(), dir=path.parent)
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


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Contiguous CPU tensors into one safetensors file: the same bytes every time, and no second copy in memory."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    known = {dtype: name for name, dtype in DTYPES.items()}
    entries = {name: (known[tensors[name].dtype], tuple(tensors[name].shape), tensors[name].nbytes) for name in order}
    write_safetensors_pieces(path, entries, (tensors[name] for name in order), metadata or {})


def write_safetensors_pieces(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...], int]],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """A safetensors file of any size, of which one piece is in memory at a time.

    Args:
        entries: dtype (safetensors' name), shape and bytes of each tensor, by name; wider dtypes first.
        pieces: contiguous CPU tensors whose bytes, one after the other, are those of all tensors in order.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in pieces:
                if piece.numel():
                    file.write(_raw(piece))
            written = file.tell() - 8 - len(text)
        if written != end:
            raise RuntimeError(f"{path}: {written} bytes of data were written, {end} announced")


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


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
    with removed_if_empty(made), _written(path):
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(), dir=path.parent))
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

    A crash between the two renames leaves the old one set aside; ``recover_directory`` puts it back. An error there
    puts it back at once.
    """
    old = _set_aside(path)
    recover_directory(path)
    with _written(path):
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(), dir=path.parent))
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


def settled_directory(path: Path) -> Path:
    """Where the content of a directory lies that ``replace_directory`` writes, or wrote when it was interrupted."""
    old = _set_aside(path)
    return old if old.exists() and not path.exists() else path


def recover_directory(path: Path) -> None:
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


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: ValueError where a key stands twice."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.100} stands twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is larger than any number")
    return number


def parse_json(data: bytes | str, what: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN or infinity. FileError names ``what``."""
    try:
        return json.loads(data, object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not valid JSON: {error}") from None


def read_bytes(path: Path, limit: int = 1 << 28) -> bytes:
    check_regular(path)
    if path.stat().st_size > limit:
        raise FileError(f"{path} has {path.stat().st_size} bytes, more than the {limit} that such a file may have")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    return parse_json(read_bytes(path), str(path))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's object with a checksum of all the rest of it, which ``read_sealed`` compares."""
    body = {key: item for key, item in value.items() if key != SEAL}
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return body | {SEAL: zlib.crc32(text.encode())}


def read_sealed(path: Path) -> dict[str, Any]:
    """The object of a JSON file. FileError where its seal is missing or broken."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    if value != sealed(value):
        raise FileError(f"{path} is damaged or was changed: its checksum differs")
    del value[SEAL]
    return value


def check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path} does not exist") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is not a regular file")


# dtype, shape, begin and end within the data section
TensorEntry = tuple[torch.dtype, tuple[int, ...], int, int]


def safetensors_header(
    path: Path, handle: int, size: int, dtypes: Mapping[str, torch.dtype]
) -> tuple[int, dict[str, TensorEntry], dict[str, str]]:
    """Start of the data section of an opened safetensors file, its tensors, its metadata. All of it checked.

    Tensors lie within the file, side by side, without overlap or gap, each at a multiple of its element's size.

    Raises:
        FileError: it is not so.
    """
    prefix = bytearray(8)
    _read_fully(handle, memoryview(prefix), 0, path)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise FileError(f"{path}: header length {length} does not fit a file of {size} bytes")
    text = bytearray(length)
    _read_fully(handle, memoryview(text), 8, path)
    header = parse_json(bytes(text), f"header of {path}")
    start = 8 + length
    if not isinstance(header, dict):
        raise FileError(f"{path}: its header is a {type(header).__name__}, wanted an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise FileError(f"{path}: its metadata should be texts by name")
    entries = {name: _tensor_entry(path, name, entry, dtypes) for name, entry in header.items()}
    for name, (dtype, shape, begin, end) in entries.items():
        if prod(max(1, side) for side in shape) >= 1 << 63:  # which torch cannot have, empty or not
            raise FileError(f"{path}: tensor {name!r:.100} has the shape {list(shape)!r:.100}")
        aligned = start % dtype.itemsize == 0 and begin % dtype.itemsize == 0  # in the file, and in a copy of its data
        if end - begin != prod(shape) * dtype.itemsize or end > size - start or not aligned:
            raise FileError(f"{path}: tensor {name!r:.100} does not lie within the file as its header says")
    edge = 0
    for begin, end in sorted(entry[2:] for entry in entries.values()):
        if begin != edge:
            raise FileError(f"{path}: tensors overlap or leave a gap at byte {start + edge}")
        edge = end
    if edge != size - start:
        raise FileError(f"{path}: {size - start - edge} bytes after the last tensor")
    return start, entries, metadata


def _tensor_entry(path: Path, name: str, entry: Any, dtypes: Mapping[str, torch.dtype]) -> TensorEntry:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        dtype, shape, (begin, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = (begin, end, *shape) if isinstance(shape, list) else ()
        if numbers and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            return dtype, tuple(shape), begin, end
    raise FileError(f"{path}: tensor {name!r:.100} has a malformed header entry {entry!r:.100}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, read and not mapped, and its metadata. FileError where it is damaged."""
    check_regular(path)
    with open(path, "rb") as file:
        size, handle = os.fstat(file.fileno()).st_size, file.fileno()
        start, entries, metadata = safetensors_header(path, handle, size, DTYPES)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, _, _) in entries.items()}
        for name, tensor in tensors.items():
            if tensor.numel():
                _read_fully(handle, _raw(tensor), start + entries[name][2], path)
    return tensors, metadata


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of a safetensors file by name and its metadata. FileError where its header is damaged."""
    check_regular(path)
    with open(path, "rb") as file:
        return safetensors_header(path, file.fileno(), os.fstat(file.fileno()).st_size, DTYPES)[1:]


def tensors_checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names, dtypes, shapes and bytes of CPU tensors, whatever their order."""
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogatepass"), found)
        if tensor.numel():
            found = zlib.crc32(_raw(tensor), found)
    return found


def append_line(path: Path, line: str) -> None:
    with _written(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def checksums(data: memoryview | bytes, chunk: int = CHECKSUM_CHUNK) -> list[int]:
    """CRC-32 of every ``chunk`` bytes."""
    view = memoryview(data)
    return [zlib.crc32(view[start : start + chunk]) for start in range(0, len(view), chunk)]


def file_checksums(path: Path) -> list[int]:
    """``checksums`` of a file's bytes, read chunk by chunk."""
    check_regular(path)
    found = []
    with open(path, "rb") as file:
        while data := file.read(CHECKSUM_CHUNK):
            found.append(zlib.crc32(data))
    return found


class MappedFile:
    """A file mapped read-only, whose pages can be dropped from resident memory.

    Args:
        path: a regular file of exactly ``size`` bytes, which must not shrink while it is mapped: ``check`` sees
            that it has not, so that a truncated file is an error message instead of a SIGBUS.
    """

    opened: weakref.WeakSet[MappedFile] = weakref.WeakSet()

    def __init__(self, path: Path, size: int) -> None:
        check_regular(path)
        self.path, self.size = path, size
        self._file = open(path, "rb")  # noqa: SIM115 - lives as long as the mapping
        self.check()
        # A private mapping: torch wants a writable buffer, and nothing written here could reach the file.
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.opened.add(self)

    def is_cut_short(self) -> bool:
        return os.fstat(self._file.fileno()).st_size < self.size

    def check(self) -> None:
        found = os.fstat(self._file.fileno()).st_size
        if found != self.size:
            raise FileError(f"{self.path} has {found} bytes and should have {self.size}: it was cut short or changed")

    def header(self, dtypes: Mapping[str, torch.dtype]) -> tuple[int, dict[str, TensorEntry]]:
        """Start of the data section and the tensors of a safetensors file, see ``safetensors_header``."""
        return safetensors_header(self.path, self._file.fileno(), self.size, dtypes)[:2]

    def checksums(self) -> list[int]:
        """``checksums`` of the file, by reading: no page of the mapping becomes resident."""
        buffer, found = memoryview(bytearray(CHECKSUM_CHUNK)), []
        for start in range(0, self.size, CHECKSUM_CHUNK):
            chunk = buffer[: min(CHECKSUM_CHUNK, self.size - start)]
            _read_fully(self._file.fileno(), chunk, start, self.path)
            found.append(zlib.crc32(chunk))
        return found

    def read(self, tensor: Tensor, start: int) -> None:
        """Fills a contiguous CPU tensor with the bytes from ``start`` on, without the mapping."""
        _read_fully(self._file.fileno(), _raw(tensor), start, self.path)

    def read_ahead(self, start: int = 0, stop: int | None = None) -> None:
        """Asks the system to have these bytes in its cache soon; returns at once. Resident memory does not grow."""
        length = (self.size if stop is None else stop) - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Makes the pages of these bytes resident in one call, which costs far less than a page fault each."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = self.size if stop is None else stop
        with contextlib.suppress(OSError):  # Linux before 5.14 does not know it: then they come one by one
            self._map.madvise(MADV_POPULATE_READ, first, last - first)

    def drop(self, start: int = 0, stop: int | None = None) -> None:
        """Gives the resident pages back, or those that lie within ``start:stop``; the next access reads them again."""
        page = mmap.PAGESIZE
        first = -(-start // page) * page
        last = self.size if stop is None else stop // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class ScratchFile:
    """A temporary file without a name, used in slots; gone with the process.

    Slots are preallocated, so a full disk is a clean ``OSError`` here and never a SIGBUS at a later write.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.what = f"a scratch file in {directory}"
        with _written(self.what):
            self._file = tempfile.TemporaryFile(prefix=_temporary_prefix(), dir=directory)  # noqa: SIM115
        self.end = 0

    def slot(self, size: int) -> Slot:
        length = -(-max(size, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with _written(self.what):
            os.posix_fallocate(self._file.fileno(), self.end, length)
        slot = Slot(self._file.fileno(), self.end, size)
        self.end += length
        return slot

    def mapped_slot(self, size: int) -> MappedSlot:
        slot = self.slot(size)
        length = self.end - slot.offset
        with _written(self.what):  # where the address space is limited
            return MappedSlot(mmap.mmap(self._file.fileno(), length, offset=slot.offset), size)


class Slot:
    """A stretch of a ``ScratchFile`` that is read and written by calls: none of it is resident memory of the process.

    The ``ScratchFile`` must live as long.
    """

    def __init__(self, handle: int, offset: int, size: int) -> None:
        self._handle, self.offset, self.size = handle, offset, size

    def write(self, tensor: Tensor) -> None:
        """The bytes of a contiguous CPU tensor, from the slot's start on."""
        view, done = _raw(tensor), 0
        with _written("a scratch file"):
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], self.offset + done)

    def read(self, tensor: Tensor) -> None:
        """Fills a contiguous CPU tensor from the slot's start on."""
        _read_fully(self._handle, _raw(tensor), self.offset, "a scratch file")


class ScratchArray:
    """A flat array in a temporary file without a name: written once from start to end, read by slices.

    Gone with the process. None of it is resident memory, but for what waits to be written.

    Args:
        directory: where the file lies; it must exist.
    """

    def __init__(self, directory: Path, dtype: DTypeLike) -> None:
        self.directory, self.dtype, self.length = directory, np.dtype(dtype), 0
        with self._writing():
            self._file = tempfile.TemporaryFile(prefix=_temporary_prefix(), dir=directory)  # noqa: SIM115 - lives with self

    def extend(self, values: Any) -> None:
        """Appends the elements of a buffer. FileError where the disk is full."""
        self.length += memoryview(values).nbytes // self.dtype.itemsize
        with self._writing():
            self._file.write(values)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> NDArray[Any]:
        start, stop, step = where.indices(self.length)
        assert step == 1, "only stretches are read"
        with self._writing():
            self._file.flush()
        found = np.empty(max(stop - start, 0), self.dtype)
        _read_fully(self._file.fileno(), found.view(np.uint8).data, start * self.dtype.itemsize, "a scratch file")
        return found

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"cannot write a scratch file in {self.directory}: {error.strerror}") from error


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _read_fully(handle: int, view: memoryview, offset: int, what: Path | str) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise FileError(f"{what} ended {len(view) - done} bytes early")
        done += count


class MappedSlot:
    """A writable stretch of a ``ScratchFile``: ``bytes`` is a uint8 tensor over it."""

    def __init__(self, mapping: mmap.mmap, size: int) -> None:
        self._map, self.size = mapping, size
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)[:size]

    def drop(self) -> None:
        """Gives the resident pages back; what was written stays in the file."""
        self._map.madvise(mmap.MADV_DONTNEED)
