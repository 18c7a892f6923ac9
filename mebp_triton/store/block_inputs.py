"""Where the blocks' inputs wait for the backward pass: on the device, in host memory, or in a file."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mebp_triton.system.errors import InPlaceChange
from mebp_triton.system.pinned import host_bytes
from mebp_triton.system.scratch import ScratchFile, Slot

from .residency import Residency, check_residency
from .side_copies import Copy, SideCopies, Streams, side_streams
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
    """Copies to host memory; for a GPU with memory of its own to pinned memory, beside the computation.

    There, a block runs while its input goes to the host. What goes is a copy on the device, since a block may change
    its input in place. In the backward pass, the next input is brought while a block runs.

    Args:
        streams: makes the streams of a device; None where the host copies.
    """

    def __init__(self, streams: Callable[[torch.device], Streams | None] = side_streams) -> None:
        self.streams = streams
        self.sides: dict[torch.device, SideCopies | None] = {}
        self.free: list[_HostMemory] = []  # used again by anything that fits into it
        self.in_use = self.most_in_use = 0  # bytes
        self._order = LoadOrder()
        self._waiting: weakref.WeakValueDictionary[int, _Sent] = weakref.WeakValueDictionary()
        self._coming: tuple[int, Copy] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model, which has memory of its own."""
        return {"streams": self.streams}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(HostBlockInputs(**state)))

    def save(self, tensor: Tensor) -> BlockInput:
        device = tensor.device
        if device not in self.sides:
            streams = self.streams(device)
            self.sides[device] = None if streams is None else SideCopies(streams)
        side = self.sides[device]
        if side is None:
            return _OnHost(tensor.detach().to("cpu", copy=True), device)
        number = self._order.next_save()
        if number == 0:
            self._waiting, self._coming = weakref.WeakValueDictionary(), None
        side.make_room()
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        memory = self._take(sent.nbytes, device)
        copy = memory.bytes[: sent.nbytes].view(sent.dtype).view(sent.shape)
        side.send(sent, copy)
        saved = self._waiting[number] = _Sent(self, number, copy, side, device)
        weakref.finalize(saved, self._release, memory)
        return saved

    def load(self, saved: _Sent) -> Tensor:
        """Returns what was saved on its device, and starts to bring what is loaded next."""
        if self._waiting.get(saved.number) is not saved:  # another forward pass has begun
            return saved.side.take(saved.bring())
        loaded = saved.side.take(self._brought(saved))
        self._coming = None
        following = self._waiting.get(self._order.next_load(saved.number))
        if following is not None:
            self._coming = following.number, following.bring()
        return loaded

    def _brought(self, saved: _Sent) -> Copy:
        if self._coming is not None and self._coming[0] == saved.number:
            return self._coming[1]
        return saved.bring()

    def _take(self, size: int, device: torch.device) -> _HostMemory:
        """The smallest free memory that is large enough; else new memory.

        New memory takes the place of free memory that is too small, so that there is never more of both than was once
        in use: passes of other lengths would add up, and the plan counts those of the longest pass alone. Shorter
        passes use the memory of longer ones, since it takes time to pin memory.
        """
        fitting = [memory for memory in self.free if memory.size >= size]
        if fitting:
            memory = min(fitting, key=lambda memory: memory.size)
            self.free.remove(memory)
            self.in_use += memory.size
            return memory
        most = max(self.most_in_use, self.in_use + size)
        while self.in_use + size + sum(memory.size for memory in self.free) > most:
            self._settle()  # a copy to it or from it may be under way
            del self.free[0]
        memory = _HostMemory(host_bytes(size, device))
        self.in_use, self.most_in_use = self.in_use + size, most
        return memory

    def _settle(self) -> None:
        for side in self.sides.values():
            if side is not None:
                side.settle()

    def _release(self, memory: _HostMemory) -> None:
        """Keeps memory for the block inputs to come."""
        self.in_use -= memory.size
        self.free.append(memory)


@dataclass(eq=False)
class _HostMemory:
    """Memory to which copies are made, one after the other."""

    bytes: Tensor

    @property
    def size(self) -> int:
        return self.bytes.numel()


class _OnHost:
    def __init__(self, copy: Tensor, device: torch.device) -> None:
        self.copy, self.device = copy, device

    def load(self) -> Tensor:
        # A copy, since the caller may change it, and it may be loaded again.
        return self.copy.to(self.device, copy=True)


@dataclass(eq=False)
class _Sent:
    """A tensor that was sent to host memory, or is on its way there; ``number`` counts those of a forward pass."""

    store: HostBlockInputs
    number: int
    copy: Tensor
    side: SideCopies
    device: torch.device

    def bring(self) -> Copy:
        return self.side.bring(self.copy, self.device)

    def load(self) -> Tensor:
        return self.store.load(self)


class LoadOrder:
    """Predicts in which order a backward pass loads what its forward pass saved: as the one before did.

    Where there is none to go by, it is the reverse of the order of the saves.
    """

    def __init__(self) -> None:
        self._saved = 0  # in this forward pass
        self._loaded: int | None = None  # the last of this backward pass
        self._after: dict[int, int] = {}  # what comes after a number, where it is not the number before it

    def next_save(self) -> int:
        """The number of what is saved now, counted from 0 in each forward pass."""
        if self._loaded is not None:
            self._follow(-1)
            self._saved, self._loaded = 0, None
        self._saved += 1
        return self._saved - 1

    def next_load(self, number: int) -> int:
        """Returns the number of what is probably loaded after ``number``, which is loaded now; -1 for nothing."""
        if self._loaded is not None:
            self._follow(number)
        self._loaded = number
        return self._after.get(number, number - 1)

    def _follow(self, number: int) -> None:
        """Takes in that ``number`` was loaded after the last one."""
        assert self._loaded is not None
        self._after.pop(self._loaded, None)
        if number != self._loaded - 1:
            self._after[self._loaded] = number


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
