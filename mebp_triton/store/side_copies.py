"""Copies between a device and host memory on a stream of their own, beside the computation.

Three waits keep them right. A copy starts after the computation that came before it, since that wrote what the copy
reads, or may still use the memory that it writes to. The computation goes on with what was brought only after the copy.
And memory on the device is kept until the computation is known to come after the copy: freed earlier, it would be used
again while the copy reads or writes it. Host memory needs no wait, because these copies alone touch it, in order;
only before it is given back, or the host touches it, all copies must be over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mebp_triton.system.pinned import copies_alone

IN_FLIGHT = 2  # tensors that are copied at once; for one more, the computation waits for the first


class Stream(Protocol):
    """Work of a device that is done in order, as ``torch.cuda.Stream``."""

    def record_event(self) -> Any: ...

    def wait_event(self, event: Any) -> None: ...


class Streams(Protocol):
    """Two streams of a device: one computes, one copies."""

    @property
    def copying(self) -> Stream:
        """The stream of the copies."""
        ...

    def computing(self) -> Stream:
        """The stream of the computation."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Starts a copy on the stream ``copying``."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        ...


class CudaStreams:
    """The current stream of a CUDA device, and one beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copying: Stream = torch.cuda.Stream(device)

    def computing(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.copying):  # type: ignore[arg-type]
            target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def side_streams(device: torch.device) -> Streams | None:
    """Makes the streams for copies beside the computation; None where ``device`` shares its memory with the host."""
    return CudaStreams(device) if copies_alone(device) else None


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy that was started.

    Attributes:
        tensor: its end on the device.
        event: comes after it, on the stream of the copies.
        number: counts the copies.
    """

    tensor: Tensor
    event: Any
    number: int


class SideCopies:
    """Sends tensors of a device to host memory and brings them back, beside the computation.

    Args:
        streams: the device's.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.started = 0
        self._held: deque[Copy] = deque()  # the computation is not known to come after these

    def send(self, source: Tensor, target: Tensor) -> None:
        """Starts to copy ``source`` to ``target`` in host memory. Nobody may write to ``source`` any more."""
        self._start(target, source, source)

    def bring(self, source: Tensor, device: torch.device) -> Copy:
        """Starts to copy ``source``, in host memory, to new memory on ``device``."""
        self.make_room()
        target = torch.empty_like(source, device=device)
        return self._start(target, source, target)

    def take(self, coming: Copy) -> Tensor:
        """Returns what was brought. Computations from now on come after the copy."""
        self._await(coming)
        return coming.tensor

    def settle(self) -> None:
        """Waits until all copies are over."""
        self.streams.synchronize()
        self._held.clear()

    def make_room(self) -> None:
        """Lets go of the tensors of earlier copies, so that memory for one more may be taken on the device."""
        while len(self._held) >= IN_FLIGHT:
            self._await(self._held[0])

    def _start(self, target: Tensor, source: Tensor, on_device: Tensor) -> Copy:
        self.make_room()
        self.streams.copying.wait_event(self.streams.computing().record_event())
        self.streams.copy(target, source)
        self.started += 1
        copy = Copy(on_device, self.streams.copying.record_event(), self.started)
        self._held.append(copy)
        return copy

    def _await(self, copy: Copy) -> None:
        """Lets the computation come after ``copy``, and so after all that were started before it."""
        self.streams.computing().wait_event(copy.event)
        while self._held and self._held[0].number <= copy.number:
            self._held.popleft()
