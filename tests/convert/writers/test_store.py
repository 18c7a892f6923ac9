"""A store is written file by file, the same bytes every time, and the manifest makes it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.store.manifest import MANIFEST, SHARED, block_file
from mebp_triton.store.reader import Store
from mebp_triton.system import reading


def int4(scheme: str, rows: int = 8) -> Int4Weight:
    values = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    return quantize_matrix(values, scheme, 32)[0]  # type: ignore[arg-type]


def write(directory: Path) -> StoreWriter:
    """A store of one block, whose two NF4 matrices share their codebook."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    writer = StoreWriter(directory, "a test", tied_head=True)
    nf4 = int4("codebook")
    floats = {
        "blocks.0.norm": torch.ones(64, dtype=torch.bfloat16),
        "blocks.0.scale": torch.arange(64.0).view(8, 8).t(),
    }
    matrices = {"blocks.0.a": (int4("affine"), 0.25), "blocks.0.b": (nf4, 0.5), "blocks.0.c": (nf4, 0.5)}
    writer.write_file(block_file(0), matrices, floats)
    writer.write_file(SHARED, {"table": (int4("symmetric", 9), 0.0)}, {"norm": torch.ones(64)})
    return writer


def test_what_was_written_is_read(tmp_path: Path) -> None:
    writer = write(tmp_path / "store")
    assert not (tmp_path / "store" / MANIFEST).exists()
    writer.finish()
    store = Store(tmp_path / "store")
    assert store.source == "a test" and store.tied_head
    assert store.matrices.keys() == {"blocks.0.a", "blocks.0.b", "blocks.0.c", "table"}
    assert store.matrices["blocks.0.a"].relative_error == 0.25 and store.matrices["table"].shape == (9, 64)
    assert store.floats == {"blocks.0.norm": block_file(0), "blocks.0.scale": block_file(0), "norm": SHARED}
    for name, scheme in (("blocks.0.a", "affine"), ("blocks.0.c", "codebook")):
        weight, truth = store.weight(name), int4(scheme)
        assert weight.scheme == scheme
        assert all(torch.equal(weight.tensors()[part], tensor) for part, tensor in truth.tensors().items())
    assert store.float_tensor("blocks.0.norm").dtype == torch.bfloat16
    tensors = load_file(tmp_path / "store" / block_file(0))
    assert {"blocks.0.b.codebook", "blocks.0.c.codebook"} <= tensors.keys(), "each matrix has its own"


def test_the_manifest_counts_bytes_and_checksums(tmp_path: Path) -> None:
    write(tmp_path / "store").finish()
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    assert manifest["files"].keys() == {block_file(0), SHARED}
    for name, entry in manifest["files"].items():
        data = (tmp_path / "store" / name).read_bytes()
        assert entry == {"bytes": len(data), "crc32": reading.checksums(data)}
    assert manifest["companions"] == {"config.json": reading.checksums(b"{}")}


def test_the_same_store_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name).finish()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_store_without_its_manifest_is_none(tmp_path: Path) -> None:
    write(tmp_path / "store")
    with pytest.raises(ValueError, match="is not a store"):
        Store(tmp_path / "store")
