"""Opens a store, and checks all that can be checked without reading the weights."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.layout import LAYOUT, Int4Weight, group_count, padded
from mebp_triton.system import reading, strict_json
from mebp_triton.system.errors import FileError
from mebp_triton.system.mapped_file import MappedFile

from .manifest import COMPANIONS, DTYPES, FORMAT, FORMAT_VERSION, MALFORMED, MANIFEST, MatrixInfo, matrix_info


class StoreFile:
    """One mapped safetensors file of a store, its header checked against its size."""

    def __init__(self, path: Path, size: int, crc32: list[int]) -> None:
        self.mapped = MappedFile(path, size)
        self.path, self.crc32 = path, crc32
        self.verified = False
        self.start, self.entries = self.mapped.header(DTYPES)

    def tensor(self, name: str, source: Tensor | None = None) -> Tensor:
        """The tensor ``name`` as a view: of the mapping, or of ``source``, a copy of the data section elsewhere."""
        dtype, shape, begin, end = self.entries[name]
        data = self.data() if source is None else source
        return data[begin:end].view(dtype).view(shape)

    def data(self) -> Tensor:
        """The data section, uint8."""
        return self.mapped.bytes[self.start :]

    def verify(self, again: bool = False) -> None:
        """Compares the checksums, once unless ``again``. FileError names the first chunk that differs."""
        self.mapped.check()
        if self.verified and not again:
            return
        found = self.mapped.checksums()
        for index, (left, right) in enumerate(zip(found, self.crc32, strict=True)):
            if left != right:
                raise FileError(
                    f"{self.path} is damaged: checksum of bytes {index * reading.CHECKSUM_CHUNK} to "
                    f"{min((index + 1) * reading.CHECKSUM_CHUNK, self.mapped.size)} differs; quantize the model again"
                )
        self._check_finite()
        self.verified = True

    def _check_finite(self) -> None:
        """The float tensors, scales among them: by reading, a little at a time."""
        for name, (dtype, shape, begin, _) in self.entries.items():
            if not dtype.is_floating_point:
                continue
            count, size = prod(shape), dtype.itemsize
            for first in range(0, count, reading.CHECKSUM_CHUNK):
                piece = torch.empty(min(reading.CHECKSUM_CHUNK, count - first), dtype=dtype)
                self.mapped.read(piece, self.start + begin + first * size)
                if not piece.isfinite().all():
                    raise FileError(f"{self.path} is damaged: {name} is not finite; quantize the model again")


class Store:
    """An opened store. Opening checks the manifest, its companions, every file's size and header; no weight is read.

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
        except MALFORMED as error:
            raise FileError(
                f"{self.directory / MANIFEST} is malformed: {type(error).__name__}: {str(error):.200}; "
                f"quantize the model again"
            ) from None

    def _read_manifest(self, manifest: dict[str, Any]) -> None:
        where = self.directory / MANIFEST
        expected = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "layout": LAYOUT,
            "checksum_chunk_bytes": reading.CHECKSUM_CHUNK,
        }
        for key, wanted in expected.items():
            if type(manifest[key]) is not type(wanted) or manifest[key] != wanted:
                raise FileError(f"{where}: {key} is {manifest[key]!r:.100}, this version reads {wanted!r}")
        self.source: str = str(manifest["source"])
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
        for name, crc32 in self.companions.items():
            self._check_companion(name, crc32)
        for added in (path for pattern in COMPANIONS for path in self.directory.glob(pattern)):
            if added.is_file() and str(added.relative_to(self.directory)) not in self.companions:
                raise FileError(
                    f"{added} was not there when the store was made: remove it, or, if you put it there, take it by "
                    f"`mebp verify --accept-changes {self.directory}`"
                )
        self.matrices = {name: matrix_info(where, name, entry) for name, entry in manifest["matrices"].items()}
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

    def _check_companion(self, name: str, crc32: list[int]) -> None:
        path = self.directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise FileError(f"{self.directory / MANIFEST}: {name!r:.100} is no path inside the store")
        if reading.file_checksums(path) != crc32:
            raise FileError(
                f"{path} is not what it was when the store was made: put it back, or, if you changed it, "
                f"take it as it is by `mebp verify --accept-changes {self.directory}`"
            )

    def _check_matrix(self, name: str, info: MatrixInfo) -> list[str]:
        """The tensors of a matrix, all there."""
        rows, columns = info.shape
        groups = (group_count(columns, info.group_size), rows)
        scale = DTYPES[info.scale_dtype]
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.uint8, (rows, padded(columns) // 2)),
            "scales": (scale, groups),
        }
        if info.scheme == "affine":
            wanted["minimum"] = (scale, groups)
        if info.scheme == "codebook":
            wanted["codebook"] = (torch.float32, (16,))
        entries = self.files[info.file].entries
        for part, (dtype, shape) in wanted.items():
            found = entries.get(f"{name}.{part}")
            if found is None or found[:2] != (dtype, shape):
                raise FileError(
                    f"{self.directory / info.file}: tensor {f'{name}.{part}':.100} should be {dtype} {shape}, "
                    f"found {'nothing' if found is None else f'{found[0]} {found[1]}'}"
                )
        return [f"{name}.{part}" for part in wanted]

    def weight(self, name: str, source: Tensor | None = None) -> Int4Weight:
        """The int4 matrix of module ``name`` as views, see ``StoreFile.tensor``."""
        info = self.matrices[name]
        file = self.files[info.file]
        has = file.entries.__contains__
        return Int4Weight(
            packed=file.tensor(f"{name}.packed", source),
            scales=file.tensor(f"{name}.scales", source),
            in_features=info.shape[1],
            group_size=info.group_size,
            minimum=file.tensor(f"{name}.minimum", source) if has(f"{name}.minimum") else None,
            codebook=file.tensor(f"{name}.codebook", source) if has(f"{name}.codebook") else None,
        )

    def float_tensor(self, name: str) -> Tensor:
        """A copy of the float parameter ``name``, in the dtype it is stored in."""
        file = self.files[self.floats[name]]
        file.verify()
        return file.tensor(name).clone()

    def float_shape(self, name: str) -> tuple[int, ...]:
        return self.files[self.floats[name]].entries[name][1]

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all matrices, and of what stayed float."""
        return [info.shape for info in self.matrices.values()] + [self.float_shape(name) for name in self.floats]

    def nbytes(self) -> int:
        return sum(file.mapped.size for file in self.files.values())

    def drop(self) -> None:
        """Gives back every resident page of every file."""
        for file in self.files.values():
            file.mapped.drop()
