"""A model directory is written piece by piece: shards, their index, rounding, and nothing where it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mebp_triton.convert.writers.model_directory import write_model_directory

TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "a": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.ones(5, dtype=torch.float16),
    "b": torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1)),
}


def write(target: Path, tensors: dict[str, Tensor] = TENSORS, dtypes: Any = None, **options: Any) -> dict[str, Tensor]:
    """Writes ``tensors`` in pieces of two rows; what is read of all files."""
    forms = {name: ((dtypes or {}).get(name, t.dtype), tuple(t.shape)) for name, t in tensors.items()}

    def pieces(name: str) -> Iterator[Tensor]:
        yield from tensors[name].split(2)

    def companions(directory: Path) -> None:
        (directory / "config.json").write_text("{}")

    write_model_directory(target, forms, pieces, companions, **options)
    return {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_one_file_with_its_companions(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = write(tmp_path / "out", progress=lambda *pair: seen.append(pair))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert found.keys() == TENSORS.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in TENSORS.items()
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_wider_dtypes_come_first(tmp_path: Path) -> None:
    """Each tensor must be aligned."""
    write(tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begins = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert sorted(begins, key=lambda name: begins[name]) == ["a", "b", "half", "bytes"]


@pytest.mark.parametrize(
    ("limit", "shards"),
    [
        (96 + 3, [{"a", "bytes"}, {"half"}, {"b"}]),
        (96 + 10, [{"bytes", "a"}, {"half", "b"}]),
        (96 + 2, [{"bytes"}, {"a"}, {"half"}, {"b"}]),
        (2, [{"bytes"}, {"a"}, {"half"}, {"b"}]),
    ],
)
def test_shards(tmp_path: Path, limit: int, shards: list[set[str]]) -> None:
    found = write(tmp_path / "out", shard_bytes=limit)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    assert {name: set(load_file(tmp_path / "out" / name)) for name in names} == dict(zip(names, shards, strict=True))
    assert index["weight_map"] == {name: file for file in names for name in load_file(tmp_path / "out" / file)}


def test_pieces_are_rounded_to_the_dtype_that_was_told(tmp_path: Path) -> None:
    found = write(tmp_path / "out", dtypes={"a": torch.bfloat16, "b": torch.float16})
    assert torch.equal(found["a"], TENSORS["a"].bfloat16()) and torch.equal(found["b"], TENSORS["b"].half())
    assert found["bytes"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e5, r"a is too large for torch\.float16: choose bfloat16"), (float("nan"), "a is not finite")],
)
def test_values_that_do_not_fit_leave_nothing(tmp_path: Path, value: float, message: str) -> None:
    broken = TENSORS["a"].clone()
    broken[-1, -1] = value
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", TENSORS | {"a": broken}, {"a": torch.float16})
    assert not list(tmp_path.iterdir())


def test_pieces_that_do_not_fill_a_tensor_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="8 bytes of data were written, 12 announced"):
        write_model_directory(
            tmp_path / "out", {"a": (torch.float32, (3,))}, lambda name: [torch.ones(2)], lambda directory: None
        )
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
