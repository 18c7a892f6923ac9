"""Block inputs that wait: loaded as they were saved, on whichever place."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from late_copies import LateStreams

from mebp_triton.store.block_inputs import FileBlockInputs, HostBlockInputs, LoadOrder, block_input_store
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


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_copies_beside_the_computation(seed: int | None, contiguous: bool) -> None:
    """Blocks that change their inputs in place: the inputs come back as they were, in several passes."""
    streams = LateStreams(seed)
    store = HostBlockInputs(lambda device: streams)
    with streams:
        for number in range(3):
            shape = (3, 4) if contiguous else (4, 3)
            tensors = [torch.full(shape, 10.0 * number + at) for at in range(5)]
            tensors = tensors if contiguous else [tensor.t() for tensor in tensors]
            saved = []
            for tensor in tensors:
                saved.append(store.save(tensor))
                tensor.mul_(-1)
            for at in (4, 3, 3, 2, 1, 0, 0):
                loaded = saved[at].load()
                assert (loaded == 10 * number + at).all() and loaded.shape == (3, 4)
                loaded.zero_()


def test_copies_overlap() -> None:
    """Each input goes while its block computes, and each but the top one's comes while the block above computes."""
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    with streams:
        saved = []
        for at in range(6):
            saved.append(store.save(torch.full((8,), float(at))))
            torch.ones(8).mul_(2)
        for at in reversed(range(6)):
            assert (saved.pop().load() == at).all()
            torch.ones(8).mul_(2)
    assert streams.copies == 12
    assert set(range(1, 13)) - streams.beside == {7}


def test_a_second_pass_brings_what_the_first_one_loaded_next() -> None:
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    order = [3, 4, 5, 0, 1, 2]  # two blocks, whose layers' outputs are loaded in the order of the layers
    with streams:
        for extra in (5, 0):  # in the first pass, five are brought that are not wanted
            before = streams.copies
            saved = [store.save(torch.full((2,), float(at))) for at in range(6)]
            for at in order:
                assert (saved[at].load() == at).all()
            assert streams.copies - before == 6 + 6 + extra


def test_inputs_of_an_earlier_pass_are_loaded_as_well() -> None:
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    with streams:
        first = [store.save(torch.full((2,), float(at))) for at in range(3)]
        assert (first[2].load() == 2).all()
        second = [store.save(torch.full((2,), 10.0 + at)) for at in range(3)]
        for at in (1, 0):
            assert (second[at].load() == 10 + at).all()
            assert (first[0].load() == 0).all(), "the input of that number which is coming is another pass's"


def test_what_one_pass_brought_and_did_not_load_is_not_used_by_the_next() -> None:
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    with streams:
        for number, loads in enumerate([(3, 2), (1, 0)]):
            saved = [store.save(torch.full((2,), 10.0 * number + at)) for at in range(4)]
            for at in loads:
                assert (saved[at].load() == 10 * number + at).all()


class Allocating(LateStreams):
    """Notes how many copies were under way when memory was taken for one more."""

    most = 0

    def __torch_dispatch__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.empty_like.default):
            self.most = max(self.most, len(self.pending))
        return super().__torch_dispatch__(func, *args, **kwargs)


def test_memory_on_the_device_is_taken_for_two_copies_at_once() -> None:
    streams = Allocating()
    store = HostBlockInputs(lambda device: streams)
    with streams:
        saved = [store.save(torch.full((2,), float(at))) for at in range(5)]
        assert streams.most == 1
        assert [saved[at].load()[0].item() for at in (0, 2, 4, 1, 3)] == [0, 2, 4, 1, 3]
        assert streams.most == 1


def test_host_memory_is_used_again() -> None:
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    with streams:
        saved = [store.save(torch.ones(size)) for size in (13, 14, 5)]
        del saved
        assert sorted(one.size for one in store.free) == [20, 52, 56] and store.in_use == 0
        memory = {id(one) for one in store.free}
        saved = [store.save(torch.full((size,), 2.0)) for size in (12, 5, 14)]
        assert not store.free and all((one.load() == 2).all() for one in saved)
        del saved
        assert {id(one) for one in store.free} == memory
        larger = [store.save(torch.ones(size)) for size in (40, 13)]
        del larger
        assert sum(one.size for one in store.free) <= store.most_in_use == 160 + 52


def test_passes_of_many_lengths_take_no_more_host_memory_than_the_longest() -> None:
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    held, most = set(), 0
    with streams:
        for length in (8, 64, 16, 64, 256, 16, 100, 8, 256):
            saved = [store.save(torch.zeros(length * wide)) for wide in (1, 4, 1, 4)]
            most = max(most, 4 * 10 * length)
            assert store.in_use + sum(one.size for one in store.free) == store.most_in_use == most
            assert all((one.load() == 0).all() for one in saved)
            del saved
            held.add(tuple(sorted(id(one) for one in store.free)))
    assert len(held) == 3, "new memory only for each longest pass so far"


def test_a_copy_of_a_store_is_empty() -> None:
    streams = LateStreams()
    store = HostBlockInputs(lambda device: streams)
    with streams:
        saved = store.save(torch.ones(3))
    other = copy.deepcopy(store)
    assert other.in_use == 0 and not other.sides and other.streams is store.streams and store.in_use == 12
    del saved


@pytest.mark.parametrize(
    ("loads", "predicted"),
    [
        ([[3, 2, 1, 0]] * 2, [[2, 1, 0, -1]] * 2),
        ([[2, 3, 0, 1]] * 2, [[1, 2, -1, 0], [3, 0, 1, -1]]),
        ([[2, 3, 0], [3, 2, 1, 0], [2, 1, 0]], [[1, 2, -1], [0, 3, 0, -1], [1, 0, -1]]),
    ],
)
def test_the_order_of_loads(loads: Any, predicted: Any) -> None:
    order = LoadOrder()
    for of_pass, expected in zip(loads, predicted, strict=True):
        assert [order.next_save() for _ in range(4)] == [0, 1, 2, 3]
        assert [order.next_load(number) for number in of_pass] == expected
