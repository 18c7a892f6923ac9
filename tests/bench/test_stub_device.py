"""A device that launches nothing: Triton's own host code runs, and the backend is chosen as on a GPU."""

import importlib

import pytest
import torch

from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.functions import int4_matmul
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.kernels.tables import architecture_of

CPU = torch.device("cpu")


@pytest.fixture
def stub_device(bench_path):
    return importlib.import_module("stub_device")


def test_launches_are_counted_and_nothing_runs(stub_device):
    weight, x = random_weight(96, 160, CPU), normal(33, 160, dtype=torch.bfloat16, device=CPU)
    names = []
    with stub_device.StubDevice(87, names.append):
        assert architecture_of(CPU) == "sm_87" and resolve_backend("triton", CPU) == "triton"
        assert int4_matmul(x, weight, backend="triton").shape == (33, 96)
        int4_matmul(x, weight, backend="triton")
    assert names[: len(names) // 2] == names[len(names) // 2 :] and names[0] == "_matmul_kernel"


def test_afterwards_the_cpu_has_no_triton(stub_device):
    with stub_device.StubDevice(90):
        pass
    assert architecture_of(CPU) == ""
    with pytest.raises(ValueError, match="runs on a GPU"):
        resolve_backend("triton", CPU)


def test_a_wrong_argument_of_a_kernel_is_an_error_as_on_a_gpu(stub_device):
    from mebp_triton.kernels.split import _sum_parts_kernel

    with stub_device.StubDevice(90), pytest.raises(TypeError):
        _sum_parts_kernel[(1,)](nothing=1)
