"""Writes a transformers model directory: safetensors files of a bounded size, and their index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.convert.readers.safetensors_dir import INDEX, SINGLE
from mebp_triton.store.manifest import dtype_name
from mebp_triton.system import atomic, safetensors_file, strict_json

SHARD_BYTES = 4 << 30
Form = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape


def write_model_directory(
    target: Path,
    tensors: Mapping[str, Form],
    pieces: Callable[[str], Iterable[Tensor]],
    save_companions: Callable[[Path], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model directory with one piece of a tensor in memory at a time. It appears whole or not at all.

    Args:
        target: must not exist, or be empty.
        tensors: dtype and shape of each tensor, by name.
        pieces: called with a name, yields the tensor's elements in order, in pieces, which are rounded to its dtype.
        save_companions: writes the config, the tokenizer's files and the like into a directory.
        progress: called with (tensors done, tensors in all).
        shard_bytes: the bytes of tensors that a file may have, unless it holds a single larger one.

    Raises:
        ValueError: a value does not fit into its dtype.
    """
    files = _shards(tensors, shard_bytes)
    done = 0

    def rounded_pieces(names: list[str]) -> Iterator[Tensor]:
        nonlocal done
        for name in names:
            for piece in pieces(name):
                yield _rounded(piece, tensors[name][0], name).contiguous()
            done += 1
            progress(done, len(tensors))

    with atomic.atomic_directory(target) as directory:
        save_companions(directory)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(files):
            file = SINGLE if len(files) == 1 else f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            entries = {name: (dtype_name(tensors[name][0]), tensors[name][1], _nbytes(tensors[name])) for name in names}
            safetensors_file.write_safetensors_pieces(directory / file, entries, rounded_pieces(names))
            weight_map |= dict.fromkeys(names, file)
        if len(files) > 1:
            size = sum(map(_nbytes, tensors.values()))
            strict_json.write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _nbytes(form: Form) -> int:
    return prod(form[1]) * form[0].itemsize


def _shards(tensors: Mapping[str, Form], limit: int) -> list[list[str]]:
    """The names of each file's tensors. The widest dtypes come first in a file, so that every tensor is aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, form in tensors.items():
        if shards[-1] and size + _nbytes(form) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(form)
    return [sorted(names, key=lambda name: -tensors[name][0].itemsize) for names in shards]


def _rounded(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = piece.to(dtype)
    if rounded.is_floating_point() and not rounded.isfinite().all():
        why = f"is too large for {dtype}: choose bfloat16" if piece.isfinite().all() else "is not finite"
        raise ValueError(f"{name} {why}")
    return rounded
