"""Pinned memory of the size that was asked for, by a runtime that stands for CUDA's."""

import contextlib
import mmap
from types import SimpleNamespace

import pytest
import torch

from mebp_triton.system import pinned

GPU = torch.device("cuda", 0)


class Runtime:
    """Notes what is registered. ``refuses`` is what registering returns, and an error that the next launch gets."""

    def __init__(self, refuses: int = 0) -> None:
        self.refuses, self.registered, self.waited_for, self.last_error = refuses, {}, [], 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.refuses:
            self.registered[address] = size
        self.last_error = self.refuses
        return self.refuses

    def launch(self) -> None:
        found, self.last_error = self.last_error, 0
        if found:
            raise RuntimeError(f"CUDA error: {found}")

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(pinned, "is_unified", lambda device: False)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", made.waited_for.append)
    return made


def test_it_is_as_large_as_asked_for_and_registered_as_long_as_a_view_of_it_is_there(runtime):
    memory = pinned.host_bytes(5000, GPU)
    assert runtime.registered == {memory.data_ptr(): 5000}
    assert memory.data_ptr() % mmap.PAGESIZE == 0 and memory.shape == (5000,) and not memory.any()
    view = memory[:4000].view(torch.float32)
    del memory
    view.fill_(2.0)
    assert len(runtime.registered) == 1 and float(view.sum()) == 2000
    assert runtime.waited_for == []
    del view
    assert runtime.registered == {} and runtime.waited_for == [GPU]


def test_two_share_no_page(runtime):
    first, second = pinned.host_bytes(10, GPU), pinned.host_bytes(10, GPU)
    assert abs(first.data_ptr() - second.data_ptr()) >= mmap.PAGESIZE


def test_what_cuda_refuses_is_left_to_torch(runtime, monkeypatch):
    runtime.refuses = 2
    asked = []
    monkeypatch.setattr(
        torch, "empty", lambda *size, device: SimpleNamespace(fill_=lambda value: device == GPU and runtime.launch())
    )
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda size, dtype, pin_memory: asked.append(pin_memory) or zeros(size, dtype=dtype)
    )
    assert pinned.host_bytes(64, GPU).shape == (64,)
    assert asked == [True] and runtime.registered == {}
    runtime.launch()  # of something else, which has nothing to do with the refusal


@pytest.mark.parametrize(("device", "unified", "size"), [("cpu", False, 8), ("cuda", True, 8), ("cuda", False, 0)])
def test_where_nothing_is_gained_nothing_is_pinned(runtime, monkeypatch, device, unified, size):
    monkeypatch.setattr(pinned, "is_unified", lambda device: unified)
    memory = pinned.host_bytes(size, torch.device(device))
    assert memory.shape == (size,) and not memory.any() and runtime.registered == {}
