"""Opens a store, and checks all that can be checked without reading the weights; see docs/store-format.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.layout import LAYOUT, Int4Weight
from mebp_triton.system import reading, strict_json
from mebp_triton.system.errors import FileError
from mebp_triton.system.mapped_file import MappedFile

from .manifest import (
    DTYPES,
    FORMAT,
    FORMAT_VERSIONS,
    MANIFEST,
    SHARED,
    BaseModel,
    MatrixInfo,
    check_companions,
    format_version,
)


class StoreFile:
    """One mapped safetensors file of a store, its header checked against its size."""

    def __init__(self, path: Path, size: int, crc32: list[int]) -> None:
        self.mapped = MappedFile(path, size)
        self.path, self.crc32 = path, crc32
        self.start, self.entries = self.mapped.header(DTYPES)
        self._unread = set(range(len(crc32)))  # the chunks whose checksums were not compared yet
        self._unproved = {name for name, entry in self.entries.items() if entry[0].is_floating_point}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoreFile:
        return self  # nothing writes to it, so copies of a model share it

    def tensor(self, name: str, source: Tensor | None = None) -> Tensor:
        """Views the tensor ``name`` in the mapping, or in ``source``, a copy of the data section elsewhere."""
        dtype, shape, begin, end = self.entries[name]
        data = self.data() if source is None else source
        return data[begin:end].view(dtype).view(shape)

    def data(self) -> Tensor:
        """The data section as bytes, mapped."""
        return self.mapped.bytes[self.start :]

    def verify(self, tensors: Iterable[str] | None = None, again: bool = False) -> None:
        """Compares the checksums, and checks that floats are finite; each only once unless ``again``.

        Args:
            tensors: the names of the tensors that are about to be read; None for the whole file.

        Raises:
            FileError: the file was cut short, or a chunk differs, the first of which is named.
        """
        self.mapped.check()
        if again:
            self._unread = set(range(len(self.crc32)))
            self._unproved = {name for name, entry in self.entries.items() if entry[0].is_floating_point}
        names, chunks = self._unproved, self._unread
        if tensors is not None:
            wanted = set(tensors)
            names, chunks = names & wanted, chunks & set(self._chunks(wanted))
        order = sorted(chunks)
        for index, crc32 in zip(order, self.mapped.checksums(order), strict=True):
            if crc32 != self.crc32[index]:
                raise FileError(
                    f"{self.path} is damaged: checksum of bytes {index * reading.CHECKSUM_CHUNK} to "
                    f"{min((index + 1) * reading.CHECKSUM_CHUNK, self.mapped.size)} differs; quantize the model again"
                )
        for name in sorted(names):
            self._check_finite(name)
        self._unread, self._unproved = self._unread - chunks, self._unproved - names

    def _chunks(self, tensors: Iterable[str]) -> Iterator[int]:
        """The chunks, each with a checksum, in which the header and the bytes of ``tensors`` lie."""
        yield from range(-(-self.start // reading.CHECKSUM_CHUNK))
        for name in tensors:
            begin, end = (self.start + place for place in self.entries[name][2:])
            yield from range(begin // reading.CHECKSUM_CHUNK, -(-end // reading.CHECKSUM_CHUNK))

    def _check_finite(self, name: str) -> None:
        """Checks a float tensor, scales perhaps, by reading a little at a time."""
        dtype, shape, begin, _ = self.entries[name]
        count, size = prod(shape), dtype.itemsize
        for first in range(0, count, reading.CHECKSUM_CHUNK):
            piece = torch.empty(min(reading.CHECKSUM_CHUNK, count - first), dtype=dtype)
            self.mapped.read(piece, self.start + begin + first * size)
            if not piece.isfinite().all():
                raise FileError(f"{self.path} is damaged: {name} is not finite; quantize the model again")


class Store:
    """An opened store: weights are views of mapped files, verified by their users before they are read.

    Opening checks the manifest, the companions, and every file's size and header; no weight is read. Companions are
    read whole for that, so a command opens its store once and passes it on.

    Raises:
        FileError: something is missing, cut short, malformed or contradicts the manifest.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileError(f"store {self.directory} is not a directory")
        if not (self.directory / MANIFEST).exists():
            raise FileError(f"{self.directory} is not a store: it has no {MANIFEST}; make one with `mebp quantize`")
        manifest = strict_json.read_sealed(self.directory / MANIFEST)
        try:
            self._read_manifest(manifest)
        except FileError:
            raise
        except strict_json.MALFORMED as error:
            raise FileError(
                f"{self.directory / MANIFEST} is malformed: {type(error).__name__}: {str(error):.200}; "
                f"quantize the model again"
            ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return self  # as its files

    def _read_manifest(self, manifest: dict[str, Any]) -> None:
        where = self.directory / MANIFEST
        expected: dict[str, tuple[str | int, ...]] = {
            "format": (FORMAT,),
            "format_version": FORMAT_VERSIONS,
            "layout": (LAYOUT,),
            "checksum_chunk_bytes": (reading.CHECKSUM_CHUNK,),
        }
        for key, known in expected.items():
            if type(manifest[key]) is not type(known[0]) or manifest[key] not in known:
                wanted = " and ".join(map(repr, known))
                raise FileError(f"{where}: {key} is {manifest[key]!r:.100}, this version reads {wanted}")
        self.source: str = str(manifest["source"])
        self.base = BaseModel.from_json(where, manifest.get("base_model"))  # older stores have none
        self.tied_head: bool = manifest["tied_head"]
        if type(self.tied_head) is not bool:
            raise FileError(f"{where}: tied_head is {self.tied_head!r:.100}, wanted true or false")
        self.files: dict[str, StoreFile] = {}
        for name, entry in manifest["files"].items():
            if set(name) & set("/\0") or not name.endswith(".safetensors"):
                raise FileError(f"{where}: {name!r:.100} is not a plain file name")
            size, crc32 = entry["bytes"], entry["crc32"]
            whole = type(size) is int and size >= 8 and len(crc32) == -(-size // reading.CHECKSUM_CHUNK)
            if not whole or any(type(checksum) is not int for checksum in crc32):
                raise FileError(f"{where}: size or checksums of {name!r:.100} are malformed")
            self.files[name] = StoreFile(self.directory / name, size, crc32)
        self.companions: dict[str, list[int]] = dict(manifest["companions"])
        check_companions(self.directory, self.companions)
        self.matrices = {name: MatrixInfo.from_json(where, name, entry) for name, entry in manifest["matrices"].items()}
        if manifest["format_version"] != (version := format_version(self.matrices.values())):
            raise FileError(f"{where}: format_version is {manifest['format_version']}, its matrices are of {version}")
        self.floats: dict[str, str] = dict(manifest["floats"])
        named = {
            (info.file, tensor) for name, info in self.matrices.items() for tensor in self._check_matrix(name, info)
        }
        for name, file in self.floats.items():
            if name not in self.files[file].entries:
                raise FileError(f"{where}: {file} has no tensor {name!r:.100}")
            named.add((file, name))
        for file, opened in self.files.items():
            for name in opened.entries:
                if (file, name) not in named:
                    raise FileError(f"{self.directory / file}: tensor {name!r:.100} is not in {MANIFEST}")

    def _check_matrix(self, name: str, info: MatrixInfo) -> list[str]:
        """Checks that the tensors of a matrix are there, in their shapes and dtypes. Returns their names."""
        wanted = info.tensors()
        entries = self.files[info.file].entries
        for part, (dtype, shape) in wanted.items():
            entry = entries.get(f"{name}.{part}")
            if entry is None or entry[:2] != (dtype, shape):
                raise FileError(
                    f"{self.directory / info.file}: tensor {f'{name}.{part}':.100} should be {dtype} {shape}, "
                    f"found {'nothing' if entry is None else f'{entry[0]} {entry[1]}'}"
                )
        return [f"{name}.{part}" for part in wanted]

    def block_matrices(self) -> list[MatrixInfo]:
        """The matrices of the blocks. Embedding and head lie in the shared file."""
        return [info for info in self.matrices.values() if info.file != SHARED]

    def weight(self, name: str, source: Tensor | None = None) -> Int4Weight:
        """Views the int4 matrix of module ``name``, see ``StoreFile.tensor``."""
        info = self.matrices[name]
        file = self.files[info.file]
        parts = {part: file.tensor(f"{name}.{part}", source) for part in info.tensors()}
        return Int4Weight(in_features=info.shape[1], group_size=info.group_size, **parts)

    def float_tensor(self, name: str) -> Tensor:
        """Copies the float parameter ``name``, in the dtype it is stored in."""
        file = self.files[self.floats[name]]
        file.verify([name])
        return file.tensor(name).clone()

    def float_shape(self, name: str) -> tuple[int, ...]:
        return self.files[self.floats[name]].entries[name][1]

    def float_sizes(self) -> dict[str, int]:
        """The bytes of every float tensor, by name."""
        return {
            name: self.files[file].entries[name][0].itemsize * prod(self.float_shape(name))
            for name, file in self.floats.items()
        }

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all matrices and of all parameters that stayed float."""
        return [info.shape for info in self.matrices.values()] + [self.float_shape(name) for name in self.floats]

    def nbytes(self) -> int:
        return sum(file.mapped.size for file in self.files.values())

    def drop(self) -> None:
        """Gives back every resident page of every file."""
        for file in self.files.values():
            file.mapped.drop()


def open_store(store: Store | Path | str) -> Store:
    """Opens the store in a directory; returns a store that is open already as it is."""
    return store if isinstance(store, Store) else Store(store)
