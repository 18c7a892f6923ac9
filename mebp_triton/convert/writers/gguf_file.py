"""Writes a GGUF file: pairs of keys and values, a table of tensors, and their data, some rows of a tensor at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mebp_triton.convert.readers.gguf_header import MAGIC, STRING, VERSIONS
from mebp_triton.convert.writers import GGUF_FLOATS
from mebp_triton.system import atomic

UINT32, FLOAT32 = 4, 6
ALIGNMENT = 32
# Of a row that is not made of whole blocks: what llama.cpp takes instead.
INSTEAD = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}


class Planned(NamedTuple):
    """A tensor of the file: its name, ggml's name of its type, and its shape in torch's order."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        block, size = _block(self.kind)
        return math.prod(self.shape) // block * size


def pair(key: str, value: str | int | float) -> bytes:
    """The bytes of a key and its value: a text, a uint32 or a float32."""
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", STRING) + _text(value)
    kind = UINT32 if isinstance(value, int) else FLOAT32
    return _text(key) + struct.pack("<II" if kind == UINT32 else "<If", kind, value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _block(kind: str) -> tuple[int, int]:
    """The weights of a block of a type, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def kind_for(kind: str, columns: int) -> str:
    """The type that a matrix with rows of ``columns`` gets where ``kind`` is asked for, as llama.cpp chooses it."""
    while columns % _block(kind)[0]:
        kind = INSTEAD.get(kind, "F16")
    return kind


def check_kind(kind: str) -> None:
    """Raises ValueError where a type cannot be written because a package is missing."""
    if kind.endswith("_K"):
        try:
            import libgguf  # noqa: F401 - an optional package, asked for before any work is done
        except ImportError as error:
            raise ValueError(f"{kind} needs the package libgguf: pip install 'mebp-triton[kquants]'") from error


def encode(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rounds rows to a type.

    Args:
        values: float32 ``[rows, columns]``; the columns are whole blocks.
        kind: one of ``GGUF_TYPES``.
        name: for messages.

    Returns:
        uint8 ``[rows, bytes of a row]``.

    Raises:
        ValueError: a value is not finite, or too large for the type.
    """
    from gguf import GGMLQuantizationType, quantize

    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite")
    number = GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        from libgguf import quantize_rows

        rounded = quantize_rows(values, int(number))
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = quantize(values, number)
    data = np.ascontiguousarray(rounded).view(np.uint8).reshape(len(values), -1)
    if not np.isfinite(decode(data, kind)).all():
        raise ValueError(f"{name} is too large for {kind}: choose {'BF16' if kind in GGUF_FLOATS else 'F32'}")
    return data


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """The float32 values ``[rows, columns]`` of what ``encode`` returned."""
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(invalid="ignore"):  # of what was too large
        return dequantize(data, GGMLQuantizationType[kind])


def write_gguf(
    target: Path,
    pairs: Iterable[bytes],
    tensors: Sequence[Planned],
    data: Callable[[str], Iterable[np.ndarray]],
    alignment: int = ALIGNMENT,
) -> None:
    """Writes a file. It appears whole or not at all.

    Args:
        target: the file.
        pairs: its keys and values; see ``pair``.
        tensors: its tensors, in the order of their data.
        data: called with a tensor's name, yields its bytes in order.
        alignment: what each tensor's place is a multiple of, as the key ``general.alignment`` states it.
    """
    from gguf import GGMLQuantizationType

    pairs = list(pairs)
    header = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(pairs)), *pairs]
    offset = 0
    for each in tensors:
        sides = each.shape[::-1]
        header.append(_text(each.name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides))
        header.append(struct.pack("<IQ", GGMLQuantizationType[each.kind], offset))
        offset += each.nbytes + -each.nbytes % alignment
    with atomic.atomic_path(target) as temporary, open(temporary, "wb") as file:
        file.write(b"".join(header))
        file.write(bytes(-file.tell() % alignment))
        for each in tensors:
            written = 0
            for piece in data(each.name):
                written += file.write(piece.data)
            if written != each.nbytes:
                raise RuntimeError(f"{each.name} has {written} bytes, planned {each.nbytes}")
            file.write(bytes(-written % alignment))
