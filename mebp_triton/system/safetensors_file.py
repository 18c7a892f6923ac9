"""safetensors files: a strict reader of headers, and a writer that holds one piece at a time.

The format: 8 bytes with the length of a JSON header, the header, and the tensors' bytes, side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .atomic import atomic_path
from .errors import FileError
from .reading import check_regular, raw_bytes, read_fully
from .strict_json import parse_json

HEADER_LIMIT = 1 << 26
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
DTYPES |= {"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPES |= {"F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def write_safetensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    together: Sequence[Collection[str]] = (),
) -> None:
    """Writes contiguous CPU tensors to a file: the same bytes every time, and no second copy in memory.

    Args:
        together: the names of tensors that are to lie side by side, group after group in front of the others. Where a
            tensor would not lie at a multiple of its element's size so, the groups are written as the others are.
    """
    order = _order(tensors, together)
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries = {name: (names[tensors[name].dtype], tuple(tensors[name].shape), tensors[name].nbytes) for name in order}
    write_safetensors_pieces(path, entries, (tensors[name] for name in order), metadata or {})


def _order(tensors: Mapping[str, Tensor], together: Sequence[Collection[str]]) -> list[str]:
    """The names in the order of the file."""

    def widest_first(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (-tensors[name].dtype.itemsize, name))

    order = [name for group in together for name in widest_first(group)]
    order += widest_first(tensors.keys() - set(order))
    end = 0
    for name in order:
        if end % tensors[name].dtype.itemsize:
            return widest_first(tensors)
        end += tensors[name].nbytes
    return order


def write_safetensors_pieces(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...], int]],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Writes a file of any size, of which one piece is in memory at a time.

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
                    file.write(raw_bytes(piece))
            written = file.tell() - 8 - len(text)
        if written != end:
            raise RuntimeError(f"{path}: {written} bytes of data were written, {end} announced")


# dtype, shape, and where in the data section the tensor begins and ends
TensorEntry = tuple[torch.dtype, tuple[int, ...], int, int]


def safetensors_header(
    path: Path, handle: int, size: int, dtypes: Mapping[str, torch.dtype]
) -> tuple[int, dict[str, TensorEntry], dict[str, str]]:
    """Reads and checks the header of an opened file of ``size`` bytes; ``dtypes`` are those it may have.

    Tensors must lie within the file, side by side, without overlap or gap, each at a multiple of its element's size.

    Returns:
        Where the data section starts; the tensors by name; the metadata.

    Raises:
        FileError: the header is malformed, or does not fit the file.
    """
    prefix = bytearray(8)
    read_fully(handle, memoryview(prefix), 0, path)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise FileError(f"{path}: header length {length} does not fit a file of {size} bytes")
    text = bytearray(length)
    read_fully(handle, memoryview(text), 8, path)
    header = parse_json(bytes(text), f"header of {path}")
    start = 8 + length
    if not isinstance(header, dict):
        raise FileError(f"{path}: its header is a {type(header).__name__}, wanted an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise FileError(f"{path}: its metadata should be texts by name")
    entries = {name: _tensor_entry(path, name, entry, dtypes) for name, entry in header.items()}
    for name, (dtype, shape, begin, end) in entries.items():
        if prod(max(1, side) for side in shape) >= 1 << 63:  # torch has no such shape, not even an empty one
            raise FileError(f"{path}: tensor {name!r:.100} has the shape {list(shape)!r:.100}")
        # Aligned in the file, which is mapped, and in a copy of its data section.
        aligned = start % dtype.itemsize == 0 and begin % dtype.itemsize == 0
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
    """Reads all tensors of a file, without mapping it, and its metadata. FileError where it is damaged."""
    check_regular(path)
    with open(path, "rb") as file:
        size, handle = os.fstat(file.fileno()).st_size, file.fileno()
        start, entries, metadata = safetensors_header(path, handle, size, DTYPES)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, _, _) in entries.items()}
        for name, tensor in tensors.items():
            if tensor.numel():
                read_fully(handle, raw_bytes(tensor), start + entries[name][2], path)
    return tensors, metadata


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Reads the entries of a file's tensors, by name, and its metadata. FileError where the header is damaged."""
    check_regular(path)
    with open(path, "rb") as file:
        return safetensors_header(path, file.fileno(), os.fstat(file.fileno()).st_size, DTYPES)[1:]


def tensors_checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names, dtypes, shapes and bytes of CPU tensors, whatever their order."""
    crc32 = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc32 = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogatepass"), crc32)
        if tensor.numel():
            crc32 = zlib.crc32(raw_bytes(tensor), crc32)
    return crc32
