"""Whose kernels a block gets, by backend, device and dtype."""

import pytest
import torch

from mebp_triton.kernels import native, native_rows
from mebp_triton.models.operation_kernels import Where, has_kernels, kernels_of


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "found"),
    [
        ("triton", "cuda", torch.bfloat16, True),
        ("panel", "cpu", torch.float32, True),
        ("panel", "cpu", torch.bfloat16, False),
        ("panel", "mps", torch.float32, False),
    ],
)
def test_where_there_are_kernels(backend, device, dtype, found):
    assert has_kernels(backend, device, dtype) == found
    with native.using("off"):
        assert has_kernels(backend, device, dtype) == (found and backend == "triton")


def test_whose_they_are():
    assert kernels_of("panel").norm is native_rows.rms_norm
    assert Where("cuda", torch.float32).kernels.norm.__module__ == "mebp_triton.kernels.rms_norm"
    assert not Where("cuda", torch.float32).holds(torch.ones(1))
    assert Where("cpu", torch.float32).holds(torch.ones(1)) and not Where("cpu", torch.float64).holds(torch.ones(1))
