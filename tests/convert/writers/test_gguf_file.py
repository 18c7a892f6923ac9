"""A GGUF file that is written is read again by the gguf package, by our own reader, and by ggml's own rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mebp_triton.convert.readers.gguf_header import read_header
from mebp_triton.convert.writers import GGUF_TYPES
from mebp_triton.convert.writers.gguf_file import Planned, check_kind, decode, encode, kind_for, pair, write_gguf

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
VALUES = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
# The relative rounding of normal values: by a float's last bit, or by a block's step.
ERRORS = {"F32": 0, "BF16": 2e-3, "F16": 3e-4, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.04, "Q5_0": 0.05}
ERRORS |= {"Q4_K": 0.08, "Q4_1": 0.08, "Q4_0": 0.1}


@pytest.mark.parametrize("alignment", [32, 64])
def test_what_is_written_is_read_again(tmp_path: Path, alignment: int) -> None:
    pairs = [pair("general.architecture", "llama"), pair("a.number", 7), pair("a.part", 0.5)]
    pairs += [pair("general.alignment", alignment)] * (alignment != 32)
    tensors = {"first": VALUES[:1, :3], "second": VALUES}
    planned = [Planned(name, "F32", values.shape) for name, values in tensors.items()]
    path = tmp_path / "a.gguf"
    write_gguf(path, pairs, planned, lambda name: np.split(tensors[name], len(tensors[name])), alignment)
    reader = gguf.GGUFReader(path)
    assert reader.fields["a.number"].contents() == 7 and reader.fields["a.part"].contents() == 0.5
    assert [tensor.name for tensor in reader.tensors] == [*tensors]
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, tensors[tensor.name]) and tensor.data_offset % alignment == 0
    assert read_header(path).tensors["second"].shape == (6, 256)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="t has 12 bytes, planned 6144"):
        write_gguf(tmp_path / "a.gguf", [], [Planned("t", "F32", VALUES.shape)], lambda name: [VALUES[0, :3]])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_is_rounded_as_closely_as_it_can(kind: str) -> None:
    if kind.endswith("_K"):
        pytest.importorskip("libgguf", reason="the extra kquants is not installed")
    data = encode(VALUES, kind, "t")
    assert data.nbytes == Planned("t", kind, VALUES.shape).nbytes
    error = np.sqrt(np.mean((decode(data, kind) - VALUES) ** 2))
    assert ERRORS[kind] / 3 <= error <= ERRORS[kind]


def test_rows_that_are_no_whole_blocks_get_another_type() -> None:
    assert [kind_for("Q4_K", columns) for columns in (512, 576, 48)] == ["Q4_K", "Q5_0", "F16"]
    assert [kind_for("Q6_K", columns) for columns in (256, 640)] == ["Q6_K", "Q8_0"]
    assert kind_for("F32", 1) == "F32"


def test_what_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="t is too large for F16: choose BF16"):
        encode(VALUES * 1e6, "F16", "t")
    with pytest.raises(ValueError, match="t is too large for Q8_0: choose F32"):
        encode(VALUES * 1e9, "Q8_0", "t")
    with pytest.raises(ValueError, match="t is not finite"):
        encode(np.full((1, 32), np.nan, np.float32), "F32", "t")
    check_kind("Q8_0")
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(ValueError, match=r"Q4_K needs the package libgguf: pip install 'mebp-triton\[kquants\]'"):
        check_kind("Q4_K")
