"""A store with its adapter -> a model directory in 16 or 32 bits, or a store again.

A merged weight is ``W + scaling·B·A``, computed in float32 and rounded once. Some rows of one matrix are in memory at
a time; of a store, a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.convert.readers.safetensors_dir import INDEX, SINGLE
from mebp_triton.convert.writers.model_directory import rounded, shards
from mebp_triton.kernels.names import Scheme
from mebp_triton.models.names import persistent_buffers
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.manifest import dtype_name
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, safetensors_file, strict_json

from .quantize import QuantizeReport, Recipe, write_store

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Makes a transformers model directory of a store, with its adapter merged in.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        target: must not exist, or be empty. It appears whole or not at all.
        adapter: in PEFT's format. Without one the weights are the store's, decoded and rounded once to ``dtype``.
        dtype: "float32", "bfloat16" or "float16"; by default the config's.
        progress: called with (tensors done, tensors in all).

    Returns:
        The dtype.

    Raises:
        ValueError: the adapter does not fit the store, one of them is damaged, or a weight is too large for float16;
            nothing is left behind.
    """
    atomic.check_absent(Path(target))
    source = MergedStore(store, adapter)
    if dtype is None:
        named = str(source.config.get_text_config().dtype).removeprefix("torch.")
        dtype = named if named in DTYPES else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    model = build_skeleton(source.config, torch.float32)
    source.bind(model)
    tensors = dict(model.named_parameters()) | {
        name: model.get_buffer(name) for name in persistent_buffers(model) if source.has(name)
    }
    wide = DTYPES[dtype]
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, tensor in tensors.items():
        kept = source.dtype(name)
        saved = wide if kept is None or kept.is_floating_point else kept
        entries[name] = dtype_name(saved), tuple(tensor.shape), prod(tensor.shape) * saved.itemsize
    files = shards(entries)
    done = 0

    def pieces(names: list[str]) -> Iterator[Tensor]:
        nonlocal done
        for name in names:
            for piece in source.pieces(name):
                yield rounded(piece, wide, name).contiguous()
            done += 1
            progress(done, len(entries))

    with atomic.atomic_directory(Path(target)) as directory:
        source.save_as(dtype, directory)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(files):
            file = SINGLE if len(files) == 1 else f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            safetensors_file.write_safetensors_pieces(
                directory / file, {name: entries[name] for name in names}, pieces(names)
            )
            weight_map |= dict.fromkeys(names, file)
        if len(files) > 1:
            size = sum(entry[2] for entry in entries.values())
            strict_json.write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return dtype


def merge_to_store(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    scheme: Scheme | None = None,
    group_size: int | None = None,
    scale_search: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Makes a store of a store, with its adapter merged in.

    Matrices that the adapter changes are quantized anew, each in its own scheme and group size unless others are asked
    for. The rest is taken over bit for bit.

    Args:
        store, target, adapter: see ``merge``.
        scheme, group_size, scale_search: see ``quantize``.
        progress: called with (matrices done, matrices in all).

    Raises:
        ValueError: as ``merge``; nothing is left behind.
    """
    recipe = Recipe(scheme, group_size, scale_search)
    atomic.check_absent(Path(target))
    source = MergedStore(store, adapter)

    def form_of(name: str) -> tuple[Scheme, int]:
        weight = source.store.weight(name)
        return weight.scheme, weight.group_size

    return write_store(source, Path(target), recipe, None, form_of, progress)
