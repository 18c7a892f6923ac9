"""Small stores that are written by hand, and ways to bend them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.accuracy import random_weight
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import Form
from mebp_triton.store.manifest import MANIFEST, SHARED, block_file
from mebp_triton.store.reader import Store
from mebp_triton.system import reading, strict_json
from mebp_triton.system.errors import FileError

ROWS, COLUMNS, GROUP = 5, 70, 32
BLOCK = block_file(0)
SEEDED = torch.Generator().manual_seed(7)
GOLDEN = bytes(range(100, 164))  # one row of 128 codes


def int4(
    scheme: str,
    seed: int = 0,
    rows: int = ROWS,
    columns: int = COLUMNS,
    group_size: int = GROUP,
    dtype: torch.dtype = torch.float16,
    bits: int = 4,
) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    shape = -(-columns // group_size), rows
    return Int4Weight.from_codes(
        codes,
        torch.randn(shape, generator=generator).to(dtype),
        group_size,
        minimum=torch.randn(shape, generator=generator).to(dtype) if scheme == "affine" else None,
        codebook=torch.randn(16, generator=generator) if scheme == "codebook" else None,
        bits=bits,
    )


WEIGHTS = {
    "model.layers.0.a": int4("symmetric", 1),
    "model.layers.0.b": int4("affine", 2),
    "model.layers.0.c": int4("codebook", 3),
    "model.layers.0.d": int4("symmetric", 4, 3, 129, 128, torch.float32),
}
EIGHT_BITS = {
    "model.layers.0.e": int4("symmetric", 5, group_size=16, bits=8),
    "model.layers.0.f": int4("affine", 6, 3, 129, 128, torch.float32, bits=8),
}
TWO_LEVEL = {
    f"model.layers.0.{letter}": random_weight(5, columns, torch.device("cpu"), *form[:2], torch.int8, SEEDED, form.bits)
    for letter, columns, form in (
        ("g", 70, Form("affine", 32)),
        ("h", 300, Form("symmetric", 16, 8)),
        ("i", 512, Form("codebook", 64)),
        ("j", 640, Form("affine", 128, 8)),
    )
}
NORM = "model.layers.0.norm.weight"
FLOATS = {
    NORM: torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "model.layers.0.half": torch.arange(3.0).half(),
    "model.layers.0.brain": torch.arange(4.0).bfloat16(),
}


def golden_store(directory: Path) -> Path:
    """A store of all schemes and dtypes, with an embedding whose bytes are known."""
    writer = StoreWriter(directory, "a test", tied_head=True)
    writer.write_file(BLOCK, {name: (weight, 0.125) for name, weight in WEIGHTS.items()}, FLOATS)
    embedding = Int4Weight(
        torch.tensor(list(GOLDEN), dtype=torch.uint8).view(1, 64), torch.tensor([[2.0], [-0.5]]), 128, 64
    )
    writer.write_file(SHARED, {"model.embed": (embedding, 0.0)}, {})
    writer.finish()
    return directory


def mixed_store(directory: Path) -> Path:
    """A store of codes of 4 and of 8 bits."""
    return _with_others(directory, EIGHT_BITS)


def two_level_store(directory: Path) -> Path:
    """A store of scales of one level and of two."""
    return _with_others(directory, EIGHT_BITS | TWO_LEVEL)


def _with_others(directory: Path, others: dict[str, Int4Weight]) -> Path:
    directory.mkdir(exist_ok=True)
    writer = StoreWriter(directory, "a test", tied_head=False)
    weights = {"model.layers.0.a": WEIGHTS["model.layers.0.a"]} | others
    writer.write_file(BLOCK, {name: (weight, 0.125) for name, weight in weights.items()}, FLOATS)
    writer.finish()
    return directory


def one_matrix(directory: Path, rows: int = ROWS, columns: int = COLUMNS) -> Path:
    """A store of the matrix "m" in one file, with random codes and scales of 1."""
    writer = StoreWriter(directory, "a test", False)
    packed = torch.randint(0, 256, (rows, -(-columns // 64) * 32), dtype=torch.uint8)
    scales = torch.ones(-(-columns // 64), rows, dtype=torch.float16)
    writer.write_file(BLOCK, {"m": (Int4Weight(packed, scales, columns, 64), 0.0)}, {})
    writer.finish()
    return directory


def refuses(directory: Path, name: str, match: str | None = None) -> None:
    """Opening fails with one line that names the file."""
    with pytest.raises(FileError, match=match) as caught:
        Store(directory)
    assert str(directory / name) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def edit(directory: Path, change: Callable[[Any], Any]) -> None:
    """Changes the manifest, and seals it again."""
    manifest = json.loads((directory / MANIFEST).read_text())
    changed = change(manifest)
    changed = changed if isinstance(changed, dict | list) else manifest
    sealed = strict_json.sealed(changed) if isinstance(changed, dict) else changed
    (directory / MANIFEST).write_text(json.dumps(sealed))


def reseal(directory: Path) -> None:
    """Tells the manifest size and checksums of the block's file as it is now, as who means harm would."""
    data = (directory / BLOCK).read_bytes()
    edit(directory, lambda m: m["files"].update({BLOCK: {"bytes": len(data), "crc32": reading.checksums(data)}}))


def flip(path: Path, place: int) -> None:
    """Flips a bit of the byte at ``place``."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
