"""Block inputs that wait: loaded as they were saved, on whichever place."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from mebp_triton.store import block_inputs
from mebp_triton.store.block_inputs import FileBlockInputs, HostBlockInputs, block_input_store
from mebp_triton.store.residency import RESIDENCIES


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1,), (0, 4)])
def test_what_was_saved_is_loaded_more_than_once(residency: Any, dtype: Any, shape: Any, tmp_path: Path) -> None:
    store = block_input_store(residency, tmp_path)
    tensor = torch.randn(shape).to(dtype)
    saved = store.save(tensor)
    for _ in range(2):
        found = saved.load()
        assert torch.equal(found, tensor) and found.dtype == dtype and found.shape == tensor.shape


@pytest.mark.parametrize("residency", ["host", "file"])
def test_a_copy_does_not_follow_its_source(residency: Any, tmp_path: Path) -> None:
    store = block_input_store(residency, tmp_path)
    tensor = torch.ones(4)
    saved = store.save(tensor)
    tensor.zero_()
    assert torch.equal(saved.load(), torch.ones(4))


@pytest.mark.parametrize("residency", ["host", "file"])
def test_what_is_loaded_may_be_changed_and_is_loaded_again_as_it_was(residency: Any, tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    saved = block_input_store(residency, tmp_path).save(tensor)
    saved.load().mul_(0.5)
    assert torch.equal(saved.load(), tensor)


def test_on_the_device_a_change_in_place_is_an_error(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    saved = block_input_store("device", tmp_path).save(tensor)
    tensor.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        saved.load()


def test_noncontiguous_tensors_are_saved_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(FileBlockInputs(tmp_path).save(tensor).load(), tensor)


def test_a_slot_is_used_again_only_when_nothing_refers_to_what_it_holds(tmp_path: Path) -> None:
    store = FileBlockInputs(tmp_path)
    first, second = store.save(torch.ones(8)), store.save(torch.full((8,), 2.0))
    del second
    gc.collect()
    third = store.save(torch.full((8,), 3.0))
    assert torch.equal(first.load(), torch.ones(8)) and torch.equal(third.load(), torch.full((8,), 3.0))
    assert store.file is not None and store.file.end == 2 * 4096


def test_nothing_is_written_before_the_first_save_and_no_file_has_a_name(tmp_path: Path) -> None:
    store = FileBlockInputs(tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    store.save(torch.ones(3))
    assert list((tmp_path / "scratch").iterdir()) == []


class Stream:
    """Stands for a CUDA stream: its events are numbers, and it notes those that it waits for."""

    def __init__(self) -> None:
        self.recorded, self.waited = 0, []

    def record_event(self) -> int:
        self.recorded += 1
        return self.recorded

    def wait_event(self, event: int) -> None:
        self.waited.append(event)


def test_pinned_memory_is_used_again_after_the_last_copy_from_it(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(block_inputs, "copies_alone", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    store = HostBlockInputs()
    first = store.save(torch.arange(6.0).view(2, 3))
    memory = first.memory
    assert torch.equal(first.load(), torch.arange(6.0).view(2, 3))
    assert (stream.recorded, stream.waited) == (2, [1])  # the load waits for the copy of the save
    second = store.save(torch.ones(6))
    assert second.memory is not memory
    del first
    third = store.save(torch.full((3, 2), 7.0))
    assert third.memory is memory and stream.waited == [1, 2]  # and this save for the copy of that load
    assert torch.equal(third.load(), torch.full((3, 2), 7.0)) and torch.equal(second.load(), torch.ones(6))
    del second, third
    assert len(store.free) == 2 and store.in_use == 0
    larger = [store.save(torch.ones(size)) for size in (13, 14, 5)]  # the last fits into what is free
    assert [one.memory.size for one in larger] == [52, 56, 24]
    del larger
    assert sum(one.size for one in store.free) <= store.most_in_use == 52 + 56 + 24
