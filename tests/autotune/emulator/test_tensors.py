"""Tensors become memory with the addresses' alignment, and with gaps that may not be touched."""

import re

import numpy as np
import pytest
import torch

from mebp_triton.autotune.emulator import tensors
from mebp_triton.autotune.emulator.faults import Fault, NotModelled
from mebp_triton.autotune.emulator.tensors import arguments_of


def load(memory, address, width=4):
    place = memory.place(np.uint64([[address]]), width, None)
    return int(memory.load(place, width, 1)[0][0, 0])


def test_values_and_addresses():
    x = torch.arange(8, dtype=torch.int32)
    memory, (first, second, size, flag) = arguments_of([("x", x), ("tail", x[3:]), ("n", -5), ("flag", True)])
    assert (second - first, size, flag) == (12, -5, 1)
    assert first % 64 == x.data_ptr() % 64 and load(memory, second) == 3 and load(memory, first + 28) == 7
    with pytest.raises(Fault, match=r"x/tail\+32"):
        load(memory, first + 32)


def test_what_a_view_does_not_cover_may_not_be_touched():
    wide = torch.arange(24, dtype=torch.int32).view(4, 6)
    memory, (address,) = arguments_of([("rows", wide[::2, :4])])
    assert [load(memory, address + 4 * place) for place in (0, 3, 12, 15)] == [0, 3, 12, 15]
    for place in (-1, 4, 6, 16):
        with pytest.raises(Fault, match=re.escape(f"rows{4 * place:+d} (of 96 bytes)")):
            load(memory, address + 4 * place)


def test_results_go_back_to_the_tensor():
    x = torch.zeros(4, dtype=torch.int32)
    memory, (address,) = arguments_of([("x", x)])
    place = memory.place(np.uint64([[address + 8]]), 4, None)
    memory.store(place, [np.uint32([[9]])], 4, np.int64([[0]]), None)
    assert x.sum() == 0
    memory.fetch()
    assert x.tolist() == [0, 0, 9, 0]


@pytest.mark.parametrize(
    "view", [lambda x: x[:3, :5], lambda x: x.t()[:3, :5], lambda x: x[1:4:2, 2:3], lambda x: x[0]]
)
def test_of_a_large_storage_only_views_are_copied(monkeypatch, view):
    monkeypatch.setattr(tensors, "LARGE", 64)
    chosen = view(torch.arange(40, dtype=torch.int32).view(5, 8))
    memory, (address, other) = arguments_of([("x", chosen), ("y", torch.zeros(2, dtype=torch.int32))])
    where = {(row,): chosen[row] for row in range(chosen.shape[0])}
    if chosen.dim() == 2:
        where = {
            (row, column): chosen[row, column] for row in range(chosen.shape[0]) for column in range(chosen.shape[1])
        }
    for index, value in where.items():
        step = sum(place * stride for place, stride in zip(index, chosen.stride(), strict=True))
        assert load(memory, address + 4 * step) == value
    last = sum((size - 1) * stride for size, stride in zip(chosen.shape, chosen.stride(), strict=True))
    with pytest.raises(Fault, match="4 bytes at x") as caught:
        load(memory, address + 4 * (last + 1))
    assert caught.value.kind == "out of bounds"
    assert load(memory, other) == 0 and abs(address - other) > 2**40


def test_tensors_without_elements():
    memory, (address, other) = arguments_of([("none", torch.zeros(0)), ("x", torch.ones(2))])
    assert load(memory, other) == 0x3F800000
    with pytest.raises(Fault):
        load(memory, address)


def test_other_arguments_are_refused():
    with pytest.raises(NotModelled, match="argument p is 0.5"):
        arguments_of([("p", 0.5)])
    with pytest.raises(NotModelled, match="argument x is on meta; only tensors on the CPU"):
        arguments_of([("x", torch.empty(3, device="meta"))])
