"""Players, which record a function and repeat it: by a CUDA graph on a device, or by calling it again anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Player(Protocol):
    """Records functions that read and write static buffers."""

    @property
    def device(self) -> torch.device | None:
        """The only device on which it records; None for any."""
        ...

    def warm_up(self, function: Callable[[], None], strict: bool) -> None:
        """Calls ``function`` as it will be recorded. ``strict``: waiting for the device is an error."""
        ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Returns what does again what ``function`` does. It may, but need not, do it a first time."""
        ...


class SameCall:
    """Plays by calling the function again. It runs on any device, and saves nothing: it is for tests."""

    device = None

    def warm_up(self, function: Callable[[], None], strict: bool) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


class DeviceGraph:
    """Captures CUDA graphs on one stream, in one memory pool.

    The graphs run one after the other and leave their results in buffers outside of the pool, so they may share it.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.device: torch.device = self.stream.device  # with its number, as tensors have it
        self.pool = torch.cuda.graph_pool_handle()

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceGraph:
        """A stream and a pool of their own, for a copy of the model."""
        return DeviceGraph(self.device)

    def warm_up(self, function: Callable[[], None], strict: bool) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _waiting_is_an_error() if strict else torch.cuda.device(self.device):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # The thread that reads the next block's weights goes on meanwhile, and may allocate.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
            function()
        return graph.replay


def device_player(device: torch.device, keep_outputs: bool) -> DeviceGraph | None:
    """Returns the player for a model's blocks on ``device``; None, with a warning, where nothing would be recorded.

    Args:
        device: where the model computes.
        keep_outputs: whether blocks keep outputs of their layers (``recompute_granularity="selective"``).

    Raises:
        ValueError: the device is none of CUDA's.
    """
    if device.type != "cuda":
        raise ValueError(f"block_graphs records CUDA graphs, and this model is on {device}: leave it out")
    reason = "ROCm is not supported" if torch.version.hip is not None else None
    if keep_outputs:
        reason = "a recompute_granularity of 'selective' keeps the outputs of layers: use 'full'"
    if reason is not None:
        warnings.warn(f"block_graphs: blocks run without graphs, since {reason}", stacklevel=3)
        return None
    return DeviceGraph(device)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """While active, most of what makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
