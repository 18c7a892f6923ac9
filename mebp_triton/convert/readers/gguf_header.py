"""Reads the header of a GGUF file: metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mebp_triton.system.foreign_errors import one_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
DOWNLOAD = "download it again"
# Numbers for each layer are read; types and scores for each token are not.
LONGEST = 1024


@dataclass(frozen=True)
class Entry:
    """A tensor's place in a file.

    Attributes:
        path: the file.
        kind: ggml's name of its type.
        shape: its shape in torch's order; it has at least one number.
        offset, nbytes: where its data lies in the file.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Length(int):
    """The length of an array whose items are not kept. It is no value of a key that wants a number."""


@dataclass(frozen=True)
class Header:
    """The metadata of a file, and the tensors by name.

    Of long arrays, and of arrays of texts, the metadata has only the ``Length``. ``places`` says where each key lies in
    the file together with its value: from one byte to before another.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in order: several where a model is split."""
        return sorted({entry.path for entry in self.tensors.values()})


def read_header(path: Path) -> Header:
    """Reads the header, and checks that every tensor lies inside the file and beside the others.

    Raises:
        ValueError: the file is not a GGUF, damaged or truncated, or the ``gguf`` package is missing.
    """
    try:
        import gguf  # noqa: F401 - an optional package, asked for here because it is needed only after slow work
    except ImportError as error:
        raise ValueError("reading GGUF files needs the gguf package; pip install 'mebp-triton[gguf]'") from error
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file (wrong first bytes); give a .gguf file or a model directory")
        with (
            one_line(f"{path} has a damaged GGUF header", DOWNLOAD),
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            header = _Cursor(data, len(MAGIC)).header(path)
            size = len(data)
    for entry in header.tensors.values():
        if entry.offset + entry.nbytes > size:
            raise ValueError(
                f"{path} is truncated: {entry.name} ends at byte {entry.offset + entry.nbytes} of {size}; {DOWNLOAD}"
            )
    places = sorted((entry.offset, entry.offset + entry.nbytes, entry.name) for entry in header.tensors.values())
    for (_, end, name), (begin, _, following) in zip(places, places[1:], strict=False):
        if begin < end:
            raise ValueError(f"{path} is damaged: {name} and {following} overlap; {DOWNLOAD}")
    return header


class _Cursor:
    """A position in the header, which cannot leave the file: each length is compared with it before it is followed."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def skip(self, size: int) -> int:
        """Steps over ``size`` bytes, and returns where they begin."""
        start, end = self.at, self.at + size
        if end > len(self.data):
            raise ValueError(f"{size} bytes at {start} run past the end at {len(self.data)}")
        self.at = end
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        start = self.skip(self.number("<Q"))
        return self.data[start : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        return self.array() if kind == ARRAY else self.number(SCALARS[kind])

    def array(self) -> Length | list[Any]:
        """Steps over an array, and returns its numbers, or its length if it is long or holds texts."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS and count <= LONGEST:
            return [self.number(SCALARS[kind]) for _ in range(count)]
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"array of type {kind}")
        return Length(count)

    def header(self, path: Path) -> Header:
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, wanted one of {VERSIONS}, little-endian")
        tensor_count, pair_count = self.number("<Q"), self.number("<Q")
        metadata, places = {}, {}
        for _ in range(pair_count):
            begin = self.at
            key = self.text()
            if key in metadata:
                raise ValueError(f"{key!r:.100} stands twice")
            metadata[key] = self.value(self.number("<I"))
            places[key] = begin, self.at
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        start = -(-self.at // alignment) * alignment
        tensors = {
            name: Entry(path, name, kind, shape, start + at, nbytes) for name, kind, shape, at, nbytes in entries
        }
        if len(tensors) != tensor_count:
            raise ValueError("a tensor's name appears twice")
        return Header(path, metadata, tensors, places)

    def entry(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """A row of the tensor table: ``Entry``'s fields after the path, the offset from the start of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text()
        shape = tuple(self.number("<Q") for _ in range(self.number("<I")))[::-1]
        kind = GGMLQuantizationType(self.number("<I"))
        block, size = GGML_QUANT_SIZES[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise ValueError(f"{name} has shape {shape}, which is not made of blocks of {block}")
        return name, kind.name, shape, self.number("<Q"), math.prod(shape) // block * size
