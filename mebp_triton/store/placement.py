"""Puts the weights of a block on the device or into host memory, or leaves them in their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mebp_triton.system.pinned import host_bytes

from .arena import ArenaPages, Stager
from .experts import ExpertPlaces, MappedExperts, StoredExperts
from .pages import MappedPages, Pages, WeightHolder
from .reader import Store, StoreFile
from .residency import Residency
from .waiting import Waiting


def place_weights(
    store: Store,
    file_name: str,
    modules: Mapping[str, WeightHolder],
    residency: Residency,
    device: torch.device,
    stager: Stager | None,
    waiting: Waiting,
    experts: Sequence[ExpertPlaces] = (),
) -> Pages:
    """Gives ``modules`` their weights, and ``experts`` the source of theirs, from one file of the store.

    Args:
        modules: int4 modules by their names in the store.
        residency: where the weights lie while their block does not run.
        stager: brings "host" and "file" to a device other than the CPU; without one the weights become resident there.

    Returns:
        What to enter while the weights are used.
    """
    file = store.files[file_name]
    if residency == "file" and device.type == "cpu" and stager is None:
        for name, module in modules.items():
            module.set_int4(store.weight(name))
        sources = [MappedExperts(store, file, of_module.names, waiting) for of_module in experts]
        for of_module, source in zip(experts, sources, strict=True):
            of_module.holder.source = source
        return MappedPages(file, waiting, sources)
    file.verify()
    if residency == "device" or stager is None:
        data = torch.empty(file.data().numel(), dtype=torch.uint8)
        file.mapped.read(data, file.start)
        data = data.to(device)
        for name, module in modules.items():
            module.set_int4(store.weight(name, data))
        for of_module in experts:
            of_module.holder.source = StoredExperts(store, of_module.names, data)
        return Pages()
    host = host_copy(file, device) if residency == "host" else None
    return ArenaPages(store, file, modules, stager, host, experts)


def host_copy(file: StoreFile, device: torch.device) -> Tensor:
    """Copies a data section to host memory, verified; pinned for a GPU with memory of its own."""
    file.verify()
    data = host_bytes(file.data().numel(), device)
    file.mapped.read(data, file.start)
    return data
