"""The second pass of a split reduction."""

import pytest
import torch

from mebp_triton.kernels.split import BLOCK, parts_of, sum_parts

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("size", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("split", [2, 4, 8])
def test_parts_are_added_in_order(normal, device, dtype, split, size):
    outs = [torch.full((size,), float("nan"), dtype=dtype, device=device) for size in (size, 0, 3)]
    parts = parts_of(outs, split)
    # The first output's first part is the start of the whole buffer.
    whole = parts[0]
    assert (whole.dtype, whole.shape) == (torch.float32, (split * (size + 3),))
    whole.copy_(normal(split * (size + 3)) * 1000)
    total = torch.zeros(size + 3, device=device)
    for part in whole.view(split, size + 3):
        total += part
    sum_parts(parts, outs, split)
    assert torch.equal(outs[0], total[:size].to(dtype)) and torch.equal(outs[2], total[size:].to(dtype))


def test_nothing_is_split(normal):
    outs = [normal(5), normal(3)]
    assert all(part is out for part, out in zip(parts_of(outs, 1), outs, strict=True))
    before = outs[0].clone()
    sum_parts(outs, outs, 1)
    assert torch.equal(outs[0], before)
