"""LoRA's gradients by all ways that lead to them."""

import pytest
import torch

from mebp_triton.kernels import accuracy, token_products
from mebp_triton.kernels.token_products import lora_a_gradient, lora_b_gradients, wide_dtype

# Too many members for one launch.
SIZES = (20, 1, 33, 7)


@pytest.fixture(params=["panel", "kernel", "library"])
def way(request, monkeypatch, device, triton_kernels):
    """Each way to a product on this device. Torch has no wide products of its own on a CPU: a stand-in."""
    monkeypatch.setattr(token_products, "_has_wide_products", lambda: request.param == "library")
    if request.param == "panel":
        return "panel"
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if request.param == "library":
            monkeypatch.setattr(token_products, "_widens", lambda tensor: tensor.itemsize == 2)
            monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    return "triton" if request.param == "kernel" else "panel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_are_wide(normal, way, dtype, out_dtype, device):
    if way == "triton" and device == "cpu":  # the interpreter has no arithmetic of bfloat16, no kernel has float64
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        out_dtype = torch.float32 if out_dtype == torch.float32 else torch.float16
    dys, ts = [normal(70, n, dtype=dtype, seed=n) for n in SIZES], normal(70, 12, dtype=dtype).split(3, dim=1)
    x, g = normal(70, 45, dtype=dtype, seed=3), normal(70, 6, dtype=dtype, seed=4)
    found = [*lora_b_gradients(dys, ts, out_dtype, way), lora_a_gradient(g, x, out_dtype, way)]
    for ours, left, right in zip(found, [*dys, g], [*ts, x], strict=True):
        truth = left.double().t() @ right.double()
        verdict = accuracy.judge(ours, truth.to(out_dtype), truth)
        limit = torch.finfo(torch.float64 if dtype == out_dtype == torch.float64 else torch.float32).eps
        error = (ours.double() - truth).norm() / truth.norm()
        assert verdict["ok"] if out_dtype.itemsize == 2 else error < 4 * limit, (verdict, error)
        assert ours.dtype == out_dtype and ours.is_contiguous()


def test_no_token(normal, way):
    (db,) = lora_b_gradients([normal(0, 5).half()], [normal(0, 2).half()], torch.float32, way)
    assert torch.equal(db.cpu(), torch.zeros(5, 2))
    assert torch.equal(
        lora_a_gradient(normal(0, 2).half(), normal(0, 5).half(), torch.float32, way).cpu(), torch.zeros(2, 5)
    )


def test_wide_dtypes():
    assert wide_dtype(torch.bfloat16, torch.float32) == wide_dtype(torch.float16) == torch.float32
    assert wide_dtype(torch.bfloat16, torch.float64) == torch.float64
