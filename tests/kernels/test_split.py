"""The second pass of a split reduction."""

import pytest
import torch

from mebp_triton.kernels.split import BLOCK, parts_buffer, sum_parts

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("size", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("split", [2, 4, 8])
def test_parts_are_added_in_order(normal, device, dtype, split, size):
    out = torch.full((size,), float("nan"), dtype=dtype, device=device)
    parts = parts_buffer(out, split)
    assert (parts.dtype, parts.shape) == (torch.float32, (split * size,))
    parts.copy_(normal(split * size) * 1000)
    total = torch.zeros(size, device=device)
    for part in parts.view(split, size):
        total += part
    sum_parts(parts, out, split)
    assert torch.equal(out, total.to(dtype))


def test_nothing_is_split(normal):
    out = normal(5)
    assert parts_buffer(out, 1) is out
    before = out.clone()
    sum_parts(out, out, 1)
    assert torch.equal(out, before)
