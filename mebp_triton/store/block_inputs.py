"""Where the blocks' inputs wait for the backward pass: on the device, in host memory, or in a file."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mebp_triton.system.errors import InPlaceChange
from mebp_triton.system.pinned import copies_alone, host_bytes
from mebp_triton.system.scratch import ScratchFile, Slot

from .residency import Residency, check_residency
from .waiting import Waiting


class BlockInput(Protocol):
    """A tensor that waits."""

    def load(self) -> Tensor:
        """Returns the tensor that was saved, on its device. May be called more than once."""
        ...


class BlockInputStore(Protocol):
    """A place where tensors wait."""

    def save(self, tensor: Tensor) -> BlockInput: ...


def block_input_store(residency: Residency, directory: Path, waiting: Waiting | None = None) -> BlockInputStore:
    """Makes the store for ``residency``; with "file", its file lies in ``directory``."""
    if residency == "device":
        return DeviceBlockInputs()
    if residency == "host":
        return HostBlockInputs()
    check_residency("checkpoints", residency)
    return FileBlockInputs(directory, waiting)


class DeviceBlockInputs:
    """Keeps the tensor itself and no copy; changing it in place before the backward pass is an error."""

    def save(self, tensor: Tensor) -> BlockInput:
        return _OnDevice(tensor)


class _OnDevice:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def load(self) -> Tensor:
        if self.tensor._version != self.version:
            raise InPlaceChange("the input of a block was modified in place between its forward and its backward pass")
        return self.tensor


class HostBlockInputs:
    """Copies to host memory; to pinned memory where a GPU with memory of its own copies from it.

    The host does not wait for such a copy. It is made in the order of the computation, so that a block which changes
    its input in place changes nothing that was saved.
    """

    def __init__(self) -> None:
        self.free: list[_HostMemory] = []  # used again by anything that fits into it
        self.in_use = self.most_in_use = 0  # bytes

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model, which has memory of its own."""
        return vars(self) | {"free": [], "in_use": 0, "most_in_use": 0}

    def save(self, tensor: Tensor) -> BlockInput:
        if not copies_alone(tensor.device):
            return _OnHost(tensor.detach().to("cpu", copy=True), tensor.device)
        memory = self._take(tensor.nbytes, tensor.device)
        copy = memory.bytes[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        memory.wait(tensor.device)
        copy.copy_(tensor.detach(), non_blocking=True)
        memory.note_use(tensor.device)
        saved = _OnHost(copy, tensor.device, memory)
        weakref.finalize(saved, self._release, memory)
        return saved

    def _take(self, size: int, device: torch.device) -> _HostMemory:
        """The smallest free memory that is large enough and not twice too large, or new memory."""
        fitting = [memory for memory in self.free if size <= memory.size <= max(2 * size, 4096)]
        if fitting:
            memory = min(fitting, key=lambda memory: memory.size)
            self.free.remove(memory)
        else:
            memory = _HostMemory(host_bytes(size, device))
        self.in_use += memory.size
        self.most_in_use = max(self.most_in_use, self.in_use)
        return memory

    def _release(self, memory: _HostMemory) -> None:
        """Keeps memory for the next block input, but no more in all than was once in use: lengths may change."""
        self.in_use -= memory.size
        self.free.append(memory)
        while sum(memory.size for memory in self.free) > self.most_in_use:
            del self.free[0]


@dataclass(eq=False)
class _HostMemory:
    """Pinned memory, and the event after which the last copy from or to it is over."""

    bytes: Tensor
    used: Any = None

    @property
    def size(self) -> int:
        return self.bytes.numel()

    def wait(self, device: torch.device) -> None:
        if self.used is not None:
            torch.cuda.current_stream(device).wait_event(self.used)

    def note_use(self, device: torch.device) -> None:
        self.used = torch.cuda.current_stream(device).record_event()


class _OnHost:
    def __init__(self, copy: Tensor, device: torch.device, memory: _HostMemory | None = None) -> None:
        self.copy, self.device, self.memory = copy, device, memory

    def load(self) -> Tensor:
        # A copy, since the caller may change it, and it may be loaded again.
        if self.memory is None:
            return self.copy.to(self.device, copy=True)
        self.memory.wait(self.device)
        loaded = self.copy.to(self.device, non_blocking=True)
        self.memory.note_use(self.device)
        return loaded


class FileBlockInputs:
    """Writes to slots of a nameless file, and reads back: what waits there is not resident memory.

    A slot is used again, by anything that fits into it, once nothing refers to the block input that had it.
    """

    def __init__(self, directory: Path, waiting: Waiting | None = None) -> None:
        self.directory = directory
        self.waiting = Waiting() if waiting is None else waiting
        self.file: ScratchFile | None = None  # made at the first save: loading a model writes nothing
        self.free: list[Slot] = []

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model, which has a file of its own."""
        return vars(self) | {"file": None, "free": []}

    def save(self, tensor: Tensor) -> BlockInput:
        with self.waiting.counted():
            slot = self._take_slot(tensor.nbytes)
            saved = _InFile(self, slot, tensor)
        weakref.finalize(saved, self.free.append, slot)
        return saved

    def _take_slot(self, size: int) -> Slot:
        """The smallest free slot that is large enough and not twice too large, or a new one."""
        if self.file is None:
            self.file = ScratchFile(self.directory)
        fitting = [slot for slot in self.free if size <= slot.size <= max(2 * size, 4096)]
        if not fitting:
            # Rounded up, so that sequences of nearly one length share slots.
            step = max(1 << max(size - 1, 1).bit_length() >> 3, 4096)
            return self.file.slot(-(-size // step) * step)
        best = min(fitting, key=lambda slot: slot.size)
        self.free.remove(best)
        return best


class _InFile:
    def __init__(self, store: FileBlockInputs, slot: Slot, tensor: Tensor) -> None:
        # The file is kept here too: slots are of no use once it is closed.
        self.file, self.waiting, self.slot = store.file, store.waiting, slot
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        if tensor.numel():
            slot.write(tensor.detach().to("cpu").contiguous())

    def load(self) -> Tensor:
        with self.waiting.counted():
            tensor = torch.empty(self.shape, dtype=self.dtype)
            if tensor.numel():
                self.slot.read(tensor)
            return tensor.to(self.device)
