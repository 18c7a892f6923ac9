"""A launch's arguments as a kernel sees them: tensors become global memory and addresses, the others integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .faults import NotModelled
from .floats import Array
from .global_memory import GlobalMemory

# Bytes of a storage of which only what tensors cover is copied.
LARGE = 1 << 28
# Large storages lie far apart from everything else.
FAR, FAR_APART = 0x1_0000_0000_0000, 1 << 40


def arguments_of(values: Sequence[tuple[str, Any]]) -> tuple[GlobalMemory, list[int]]:
    """Makes global memory of the tensors among named arguments, and an integer of each argument.

    What tensors do not cover of their storages may not be touched. Addresses keep their alignment.
    """
    memory, addresses = GlobalMemory(), {}
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for name, value in values:
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise NotModelled(f"argument {name} is on {value.device}; only tensors on the CPU can be used here")
            storages.setdefault(value.untyped_storage().data_ptr(), []).append((name, value))
    for number, (pointer, views) in enumerate(storages.items()):
        storage = views[0][1].untyped_storage()
        size = storage.nbytes()
        data = torch.tensor((), dtype=torch.uint8).set_(storage).numpy() if size else np.zeros(0, dtype=np.uint8)
        if size <= LARGE:
            allowed = np.zeros(size, dtype=bool)
            for _, tensor in views:
                _allow(tensor, allowed)
            names = "/".join(dict.fromkeys(name for name, _ in views))
            addresses[pointer] = memory.add(names, data, allowed, pointer % 256).address
            continue
        addresses[pointer] = FAR + number * FAR_APART + pointer % 256
        for name, tensor in views:
            for first, length in _runs(tensor):
                memory.add_at(name, data[first : first + length], addresses[pointer] + first)
    memory.ready()
    return memory, [_as_integer(name, value, addresses) for name, value in values]


def _as_integer(name: str, value: Any, addresses: dict[int, int]) -> int:
    if isinstance(value, Tensor):
        pointer = value.untyped_storage().data_ptr()
        return addresses[pointer] + value.data_ptr() - pointer
    if not isinstance(value, int):
        raise NotModelled(f"argument {name} is {value!r:.50}; tensors and integers are modelled")
    return int(value)


def _runs(tensor: Tensor) -> list[tuple[int, int]]:
    """First byte and length of each run of a view of a large storage, without overlaps."""
    size = tensor.element_size()
    last = tensor.shape[-1] if tensor.dim() and tensor.stride(-1) == 1 else 1
    rows = tensor[..., 0] if last > 1 else tensor
    places = np.array([tensor.storage_offset()])
    for length, stride in zip(rows.shape, rows.stride(), strict=True):
        places = (places[:, None] + np.arange(length) * stride).ravel()
    runs: list[tuple[int, int]] = []
    for first in np.unique(places) * size:
        if runs and first <= sum(runs[-1]):
            runs[-1] = runs[-1][0], int(first) + last * size - runs[-1][0]
        else:
            runs.append((int(first), last * size))
    return runs


def _allow(tensor: Tensor, allowed: Array) -> None:
    """Marks the bytes of a tensor's elements."""
    if tensor.numel():
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        start = tensor.storage_offset() * size
        torch.as_strided(torch.from_numpy(allowed), (*tensor.shape, size), (*strides, 1), start).fill_(True)
