"""Weights brought in while a block runs, and dropped after it.

Where they lie: ``device`` in the device's memory throughout; ``host`` in the host's; ``file`` in the store's files,
memory-mapped. A device that is not the CPU gets a block's bytes by one copy into an arena that all blocks share.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mebp_triton.lora import Int4Module

from .checkpoints import RESIDENCIES, Residency
from .format import Store, StoreFile


class MappedPages:
    """Weights that are views of a mapped file. Leaving gives their resident pages back."""

    def __init__(self, file: StoreFile) -> None:
        self.file = file
        self.depth = 0

    def __enter__(self) -> None:
        self.file.verify()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.file.mapped.drop()


class Arena:
    """A buffer on the device that holds one block's data section at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.owner: object = None

    def fill(self, owner: object, data: Tensor) -> Tensor:
        """``data``'s copy on the device; not copied again if ``owner`` was the last to fill."""
        if self.buffer.numel() < data.numel():
            self.buffer, self.owner = torch.empty(data.numel(), dtype=torch.uint8, device=self.device), None
        view = self.buffer[: data.numel()]
        if self.owner is not owner:
            view.copy_(data, non_blocking=True)
            self.owner = owner
        return view


class ArenaPages:
    """Weights that are views of the arena while within, and lie nowhere (on the meta device) otherwise."""

    def __init__(
        self, store: Store, file: StoreFile, modules: Mapping[str, Int4Module], arena: Arena, host: Tensor | None
    ) -> None:
        self.store, self.file, self.modules, self.arena, self.host = store, file, modules, arena, host
        self.depth = 0
        self._leave()

    def __enter__(self) -> None:
        if self.depth:
            self.depth += 1
            return
        self.file.verify()
        self.depth = 1
        data = self.arena.fill(self, self.file.data() if self.host is None else self.host)
        if self.host is None:
            self.file.mapped.drop()
        for name, module in self.modules.items():
            module.set_int4(self.store.weight(name, data))

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._leave()

    def _leave(self) -> None:
        for name, module in self.modules.items():
            module.set_int4(self.store.weight(name).to("meta"))


def check_residency(name: str, value: str) -> None:
    if value not in RESIDENCIES:
        raise ValueError(f"{name} must be one of {', '.join(RESIDENCIES)}, got {value!r}")


def place_weights(
    store: Store,
    file_name: str,
    modules: Mapping[str, Int4Module],
    residency: Residency,
    device: torch.device,
    arena: Arena | None,
) -> AbstractContextManager[object]:
    """Puts the weights of ``modules`` (names in the store) where ``residency`` says; returns what to enter to use them.

    ``arena``: for a device other than the CPU and residency "host" or "file"; without one they become resident.
    """
    file = store.files[file_name]
    if residency == "file" and device.type == "cpu" and arena is None:
        for name, module in modules.items():
            module.set_int4(store.weight(name))
        return MappedPages(file)
    file.verify()
    if residency == "device" or arena is None:
        data = file.data().to(device, copy=True)
        file.mapped.drop()
        for name, module in modules.items():
            module.set_int4(store.weight(name, data))
        return nullcontext()
    host = None
    if residency == "host":
        host = file.data().clone()
        host = host.pin_memory() if device.type == "cuda" else host
        file.mapped.drop()
    return ArenaPages(store, file, modules, arena, host)
