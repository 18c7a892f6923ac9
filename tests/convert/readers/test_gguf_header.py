"""The header of a GGUF file: where tensors lie, and every way it can be wrong."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_bytes import Q4_0, content, pair, tensor, text  # noqa: E402

from mebp_triton.convert.readers.gguf_header import Length, read_header  # noqa: E402

ALL_KINDS = [
    pair("u8", 0, b"\xff"),
    pair("i8", 1, b"\xff"),
    pair("u16", 2, struct.pack("<H", 65535)),
    pair("i16", 3, struct.pack("<h", -2)),
    pair("u32", 4, struct.pack("<I", 1 << 31)),
    pair("i32", 5, struct.pack("<i", -3)),
    pair("f32", 6, struct.pack("<f", 0.25)),
    pair("bool", 7, b"\1"),
    pair("u64", 10, struct.pack("<Q", 1 << 63)),
    pair("i64", 11, struct.pack("<q", -4)),
    pair("f64", 12, struct.pack("<d", 0.5)),
    pair("name", 8, text("ü")),
    pair("numbers", 9, struct.pack("<IQ", 4, 3) + bytes(12)),
    pair("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
]
TENSORS = [tensor("a", (4, 2)), tensor("b", (2, 32), Q4_0, 32)]  # side by side


def test_metadata_and_places(tmp_path: Path) -> None:
    for version in (2, 3):
        (tmp_path / "x").write_bytes(content(ALL_KINDS, TENSORS, 32 + 36, version))
        header = read_header(tmp_path / "x")
        numbers = {"u8": 255, "i8": -1, "u16": 65535, "i16": -2, "u32": 1 << 31, "i32": -3, "u64": 1 << 63, "i64": -4}
        others = {"f32": 0.25, "f64": 0.5, "bool": True, "name": "ü", "numbers": [0, 0, 0], "words": 2}
        assert header.metadata == numbers | others and isinstance(header.metadata["words"], Length)
        a, b = header.tensors["a"], header.tensors["b"]
        assert (a.kind, a.shape, a.nbytes) == ("F32", (4, 2), 32)
        assert (b.kind, b.shape, b.nbytes) == ("Q4_0", (2, 32), 36) and b.offset == a.offset + 32
        assert a.offset % 32 == 0 and b.offset + b.nbytes == (tmp_path / "x").stat().st_size


@pytest.mark.parametrize("alignment", [1, 256])
def test_data_begins_at_a_multiple_of_the_alignment(tmp_path: Path, alignment: int) -> None:
    pairs = [pair("general.alignment", 4, struct.pack("<I", alignment))]
    data = content(pairs, [tensor("a", (6,))], 24, alignment=alignment)
    (tmp_path / "x").write_bytes(data)
    assert read_header(tmp_path / "x").tensors["a"].offset == len(data) - 24 and (len(data) - 24) % alignment == 0


HUGE = struct.pack("<Q", 1 << 60)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "short": (b"GG", "is not a GGUF file"),
    "zip": (b"PK\x03\x04 a zip archive", "is not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "damaged GGUF header .*little-endian"),
    "version": (content(version=1), "damaged GGUF header .*version 1, wanted one of"),
    "pair count": (b"GGUF" + struct.pack("<IQ", 3, 0) + HUGE, "damaged GGUF header .*past the end"),
    "tensor count": (b"GGUF" + struct.pack("<I", 3) + HUGE + bytes(8), "damaged GGUF header .*past the end"),
    "key length": (content([HUGE + b"key"]), "damaged GGUF header .*past the end"),
    "array length": (content([pair("a", 9, struct.pack("<I", 4) + HUGE)]), "damaged GGUF header .*past the end"),
    "text length": (content([pair("a", 9, struct.pack("<IQ", 8, 2) + HUGE)]), "damaged GGUF header .*past the end"),
    "nested array": (content([pair("a", 9, struct.pack("<IQ", 9, 1))]), "damaged GGUF header .*array of type 9"),
    "value type": (content([pair("a", 99, b"")]), "damaged GGUF header"),
    "key twice": (content([pair("a", 7, b"\1")] * 2), "damaged GGUF header .*'a' stands twice"),
    "not UTF-8": (content([struct.pack("<Q", 1) + b"\xff" + bytes(4)]), "damaged GGUF header"),
    "alignment": (content([pair("general.alignment", 4, bytes(4))]), "damaged GGUF header .*alignment 0"),
    "tensor type": (content(tensors=[tensor("a", (2,), 999)]), "damaged GGUF header .*999"),
    "no sides": (content(tensors=[tensor("a", ())]), "damaged GGUF header .*not made of blocks"),
    "nothing": (content(tensors=[tensor("a", (0, 32), Q4_0)]), "damaged GGUF header .*not made of blocks"),
    "half a block": (content(tensors=[tensor("a", (2, 33), Q4_0)]), "damaged GGUF header .*blocks of 32"),
    "tensor twice": (content(tensors=[tensor("a", (2,))] * 2, data=8), "damaged GGUF header .*appears twice"),
    "truncated": (content(tensors=[tensor("a", (2,))], data=7), "is truncated: a ends at byte .*; download it again"),
    "overlap": (
        content(tensors=[tensor("b", (2,), offset=4), tensor("a", (2,))], data=32),
        "is damaged: a and b overlap; download it again",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(tmp_path / "x.gguf")
    assert "x.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_cut_off_anywhere(tmp_path: Path) -> None:
    data = content(ALL_KINDS, TENSORS, 32 + 36)
    for keep in range(4, len(data)):
        (tmp_path / "x").write_bytes(data[:keep])
        with pytest.raises(ValueError, match="damaged GGUF header|is truncated"):
            read_header(tmp_path / "x")


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"mebp-triton\[gguf\]"):
        read_header(tmp_path / "x")
