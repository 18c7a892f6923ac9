"""Puts the weights of a block where the settings say: device, host or file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.system.machine import is_unified

from .arena import ArenaPages, Stager
from .pages import MappedPages, Pages
from .reader import Store, StoreFile
from .residency import Residency
from .waiting import Waiting


def place_weights(
    store: Store,
    file_name: str,
    modules: Mapping[str, Int4Module],
    residency: Residency,
    device: torch.device,
    stager: Stager | None,
    waiting: Waiting,
) -> Pages:
    """Puts the weights of ``modules`` (names in the store) where ``residency`` says; returns what to enter to use them.

    ``stager``: for a device other than the CPU and residency "host" or "file"; without one they become resident.
    """
    file = store.files[file_name]
    if residency == "file" and device.type == "cpu" and stager is None:
        for name, module in modules.items():
            module.set_int4(store.weight(name))
        return MappedPages(file, waiting)
    file.verify()
    if residency == "device" or stager is None:
        data = torch.empty(file.data().numel(), dtype=torch.uint8)
        file.mapped.read(data, file.start)
        data = data.to(device)
        for name, module in modules.items():
            module.set_int4(store.weight(name, data))
        return Pages()
    return ArenaPages(store, file, modules, stager, host_copy(file, device) if residency == "host" else None)


def host_copy(file: StoreFile, device: torch.device) -> Tensor:
    """The data section in host memory, verified, and pinned for a GPU with memory of its own."""
    file.verify()
    pinned = device.type == "cuda" and not is_unified(device)
    data = torch.empty(file.data().numel(), dtype=torch.uint8, pin_memory=pinned)
    file.mapped.read(data, file.start)
    return data
