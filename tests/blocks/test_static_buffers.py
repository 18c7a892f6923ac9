"""Buffers that stay where they are: which layouts they take, who shares them, and what is copied."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from mebp_triton.blocks.static_buffers import StaticBuffer, StaticBuffers, empty_like, has_buffer

BASE = torch.arange(24.0).view(4, 6)
LAYOUTS = [
    BASE,
    BASE.t(),
    BASE[:, 1:3],
    BASE[:1].expand(5, 6),
    BASE[:, :1].expand(4, 3),
    torch.tensor(3.0),
    BASE[:0],
    torch.ones(2, 2, dtype=torch.bool),
]


@pytest.mark.parametrize("tensor", LAYOUTS)
def test_a_buffer_has_the_layout_of_its_tensor(tensor: Tensor) -> None:
    buffers = StaticBuffers()
    buffer = buffers.get("x", tensor)
    assert has_buffer(tensor) and buffer.tensor.stride() == tensor.stride()
    buffers.fill([(buffer, tensor)])
    (copied,) = buffers.copies([buffer])
    assert torch.equal(copied, tensor) and copied.stride() == tensor.stride()
    assert copied.numel() == 0 or copied.data_ptr() != buffer.tensor.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("tensor", [BASE.as_strided((5, 3), (1, 1)), torch.ones(2).to_sparse()])
def test_layouts_without_a_buffer(tensor: Tensor) -> None:
    assert not has_buffer(tensor)


def test_tensors_of_one_dtype_take_one_copy() -> None:
    calls: list[int] = []

    def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(len(targets))
        torch._foreach_copy_(targets, sources)

    buffers = StaticBuffers(copy)
    tensors = [torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.int64)]
    pairs = [(buffers.get(place, tensor), tensor) for place, tensor in enumerate(tensors)]
    buffers.fill(pairs)
    assert calls == [2, 1] and all(torch.equal(buffer.tensor, tensor) for buffer, tensor in pairs)


def test_a_buffer_knows_what_it_holds() -> None:
    buffers, x = StaticBuffers(), torch.ones(3)
    buffer = buffers.get("x", x)
    assert not buffer.holds(x)
    buffers.fill([(buffer, x)])
    assert buffer.holds(x) and not buffer.holds(x.clone())
    x.add_(1)
    assert not buffer.holds(x), "x was written to"
    buffers.fill([(buffer, x.clone())])
    gc.collect()
    assert not buffer.holds(torch.ones(3)), "what was copied is gone, and its id may come again"
    with torch.inference_mode():
        unversioned = torch.ones(3)
    buffers.fill([(buffer, unversioned)])
    assert not buffer.holds(unversioned)


def test_users_share_a_buffer_and_the_last_one_frees_it() -> None:
    buffers, x = StaticBuffers(), torch.ones(3)
    first = buffers.get("x", x)
    assert buffers.get("x", x + 1) is first
    others = [buffers.get("y", x), buffers.get("x", x.double()), buffers.get("x", torch.ones(4))]
    assert first not in others and len(set(others)) == 3
    assert buffers.nbytes() == 12 + 12 + 24 + 16
    del others
    gc.collect()
    assert buffers.nbytes() == 12


def test_memory_of_its_own() -> None:
    assert StaticBuffer(BASE).tensor.data_ptr() != BASE.data_ptr() != empty_like(BASE).data_ptr()
