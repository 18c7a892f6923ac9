"""Triton's interpreter as the tests run it: it is stricter than a GPU, and leaves no trace afterwards."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.language import core

from mebp_triton.kernels import matmul
from mebp_triton.kernels.running_softmax import RunningSoftmax
from mebp_triton.kernels.softmax_tile import update_softmax

pytestmark = pytest.mark.usefixtures("triton_kernels")


def test_under_the_interpreters_own_switch():
    """``TRITON_INTERPRET=1`` works for a whole process as well."""
    program = """
import torch
from mebp_triton.kernels import matmul, reference
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.matmul import int4_matmul_triton
torch.manual_seed(0)
codes = torch.randint(0, 16, (5, 70), dtype=torch.uint8)
weight = Int4Weight.from_codes(codes, torch.randn(3, 5), 32)
x = torch.randn(3, 70)
torch.testing.assert_close(int4_matmul_triton(x, weight), reference.matmul(x, weight), rtol=1e-5, atol=1e-4)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@triton.jit
def _careless_kernel(x_ptr, y_ptr, N, MASKED: tl.constexpr):
    offs_n = tl.arange(0, 16)
    mask = offs_n < N if MASKED else offs_n < 16
    tl.store(y_ptr + offs_n, tl.load(x_ptr + offs_n, mask=mask))


def test_the_interpreter_here_is_strict(device):
    if device == "cuda":
        pytest.skip("of the interpreter")
    kernel = type(matmul._matmul_kernel)(_careless_kernel.fn)
    x, y = torch.zeros(10), torch.zeros(16)
    kernel[(1,)](x, y, 10, MASKED=True)
    assert torch.equal(y.isnan(), torch.arange(16) >= 10)
    with pytest.raises(Exception, match="load of 6 addresses outside"):
        kernel[(1,)](x, y, 10, MASKED=False)
    with pytest.raises(Exception, match="store of 6 addresses outside"):
        kernel[(1,)](y, x, 16, MASKED=False)


def test_the_interpreter_leaves_the_language_as_it_was(normal, device):
    """``tl.max`` is a function of the language's own library; what it calls must still compile afterwards."""
    softmax = RunningSoftmax(torch.tensor([0], device=device), torch.float32, 1.0)
    before = {name: value for name, value in vars(core).items() if core.is_builtin(value)}
    update_softmax(softmax, normal(1, 5), None, 0)
    assert len(before) > 50
    assert [name for name, value in before.items() if getattr(core, name) is not value] == []
