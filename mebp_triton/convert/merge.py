"""Merges a store with its adapter, into a model directory of 16 or 32 bits, or into a store again.

A merged weight is ``W + scaling * B @ A``, computed in float32 and rounded once. At any time only some rows of a matrix
are in memory; for a new store, one block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.convert.writers.model_directory import write_model_directory
from mebp_triton.kernels.names import Scheme
from mebp_triton.models.names import persistent_buffers, tensor_shapes
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic

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
        adapter: a directory in PEFT's format. Without one, the store's own weights are decoded and rounded once.
        dtype: "float32", "bfloat16" or "float16"; by default the config's.
        progress: called with (tensors done, tensors in all).

    Returns:
        The dtype's name.

    Raises:
        ValueError: the adapter does not fit the store, one of them is damaged, or a weight is too large for float16;
            nothing is left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    atomic.check_absent(Path(target))
    source = MergedStore(store, adapter)
    configured = str(source.config.get_text_config().dtype).removeprefix("torch.")
    chosen = dtype or (configured if configured in DTYPES else "bfloat16")
    model = build_skeleton(source.config, torch.float32)
    source.bind(model)

    def saved_dtype(name: str) -> torch.dtype:
        stored = source.dtype(name)
        return DTYPES[chosen] if stored is None or stored.is_floating_point else stored

    shapes = tensor_shapes(model)
    names = [name for name, _ in model.named_parameters()]
    names += [name for name in persistent_buffers(model) if source.has(name)]
    tensors = {name: (saved_dtype(name), shapes[name]) for name in names}
    write_model_directory(
        Path(target), tensors, source.pieces, lambda directory: source.save_as(chosen, directory), progress
    )
    return chosen


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

    The matrices that the adapter changes are quantized anew, each in its own scheme and group size unless others are
    asked for. The rest is taken over bit for bit.

    Args:
        store, target, adapter: see ``merge``.
        scheme, group_size, scale_search: see ``quantize``.
        progress: called with (matrices done, matrices in all).

    Raises:
        ValueError: see ``merge``; nothing is left behind.
    """
    recipe = Recipe(scheme, group_size, scale_search)
    atomic.check_absent(Path(target))
    source = MergedStore(store, adapter)

    def form_of(name: str) -> tuple[Scheme, int]:
        weight = source.store.weight(name)
        return weight.scheme, weight.group_size

    return write_store(source, Path(target), recipe, None, form_of, progress)
