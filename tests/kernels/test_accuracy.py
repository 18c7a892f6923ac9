"""The rule of correctness passes torch's own results and no result with a small fault. Random weights."""

import json
import re

import pytest
import torch

from mebp_triton.kernels.accuracy import judge, normal, random_weight, sequential_product
from mebp_triton.kernels.layout import group_count
from mebp_triton.kernels.names import FORMS, Form
from mebp_triton.kernels.reference import decode

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def product(dtype=torch.float32, m=30, n=40, k=50):
    """Torch's product of random matrices in ``dtype``, and the exact one."""
    generator = torch.Generator().manual_seed(0)
    x, w = (normal(*shape, dtype=dtype, device=CPU, generator=generator) for shape in ((m, k), (k, n)))
    return x @ w, x.double() @ w.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_result_passes(dtype):
    same, truth = product(dtype)
    verdict = judge(same, same, truth, product=True)
    assert verdict["ok"] and verdict["narrow"] and "reason" not in verdict
    assert verdict["max"] == verdict["torch_max"] > 0 and verdict["rms"] == verdict["torch_rms"] > 0
    assert verdict["relative"] == pytest.approx(float((same.double() - truth).norm() / truth.norm()))


def spoiled(y, place, value):
    y = y.clone()
    y[place] = value
    return y


FAULTS = {
    "one element off": (lambda y: spoiled(y, (0, 3), y[0, 3] + y.abs().max() * 1e-5), "max error"),
    "a little too large": (lambda y: y * (1 + 1e-5), "error"),
    "two rows exchanged": (lambda y: y[[1, 0, *range(2, len(y))]], "error"),
    "a NaN": (lambda y: spoiled(y, (2, 2), float("nan")), "not finite"),
    "an infinity": (lambda y: spoiled(y, (2, 2), float("-inf")), "not finite"),
    "another shape": (lambda y: y[:, :-1], r"result is \(30, 39\) torch.float32, wanted \(30, 40\) torch.float32"),
    "another dtype": (lambda y: y.double(), r"result is \(30, 40\) torch.float64, wanted \(30, 40\) torch.float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    same, truth = product()
    change, reason = FAULTS[fault]
    verdict = judge(change(same), same, truth)
    assert not verdict["ok"] and not verdict.get("narrow")
    assert re.search(reason, verdict["reason"])
    json.dumps(verdict, allow_nan=False)


def test_spread_out_error_is_seen_though_no_element_is_far_off():
    """The largest of torch's errors is some three times their root mean square."""
    same, truth = product(m=300, n=300)
    size = float((same.double() - truth).abs().max())
    verdict = judge((truth + size * torch.sign(normal(300, 300, dtype=torch.float64, device=CPU))).float(), same, truth)
    assert verdict["max"] <= 2 * verdict["torch_max"] + 1e-6 and not verdict["ok"] and "rms error" in verdict["reason"]


def test_twice_torchs_error_and_half_a_rounding_is_the_limit():
    """Next to 0.75, float32 numbers are 2^-24 apart, which is more than half a rounding by the rule: 0.75 * 2^-24."""
    truth = torch.full((1000,), 0.75, dtype=torch.float64)
    for torch_error in (0.0, 2.0**-16):
        same = (truth + torch_error).float()
        assert judge((truth + 2 * torch_error).float(), same, truth)["ok"]
        assert not judge((truth + 2 * torch_error + 2.0**-24).float(), same, truth)["ok"]
        share = judge((truth + torch_error + 2.0**-26).float(), same, truth)["share"]
        assert share == pytest.approx(0.5 if torch_error else 0, abs=0.01)
    exact = judge(truth.float(), truth.float(), truth)
    assert exact["ok"] and exact["torch_max"] == 0


def test_narrow_allows_no_more_than_torchs_error_and_a_rounding():
    truth = torch.full((1000,), 0.75, dtype=torch.float64)
    same = (truth + 2.0**-16).float()
    wide = judge((truth + 1.9 * 2.0**-16).float(), same, truth)
    assert wide["ok"] and not wide["narrow"]
    assert judge((truth + 1.001 * 2.0**-16).float(), same, truth)["narrow"]


def test_a_product_has_a_limit_of_its_own():
    """A result that is as far off as torch's may still be too far off."""
    _, truth = product()
    same = (truth * (1 + 2e-6)).float()
    assert judge(same, same, truth)["ok"]
    verdict = judge(same, same, truth, product=True)
    assert not verdict["ok"] and "relative error" in verdict["reason"]
    assert verdict["share"] == pytest.approx(2, abs=0.01)


def test_torchs_own_overflow_allows_nothing():
    truth = torch.full((4,), 7e4, dtype=torch.float64)
    verdict = judge(torch.zeros(4, dtype=torch.float16), truth.half(), truth)
    assert not verdict["ok"] and "torch's own result is not finite" in verdict["reason"]


def test_nothing_is_right_and_so_is_exactly_zero():
    assert judge(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == {
        "ok": True,
        "narrow": True,
        "share": 0.0,
    }
    zeros = torch.zeros(4, 3)
    verdict = judge(zeros, zeros, zeros.double(), product=True)
    assert verdict["ok"] and verdict["relative"] is None
    assert not judge(zeros + 1e-30, zeros, zeros.double(), product=True)["ok"]


def test_a_product_of_ones_added_one_after_another_stops_growing():
    """Beyond 2^24, float32 does not see another 1."""
    left = torch.cat((torch.full((2, 1), 2.0**24), torch.ones(2, 50)), 1)
    assert torch.equal(sequential_product(left, torch.ones(51, 3)), torch.full((2, 3), 2.0**24))
    left, right = (torch.randn(5, 7, dtype=torch.float64).float() for _ in range(2))
    assert torch.allclose(sequential_product(left, right.t()), left @ right.t(), atol=1e-5)


def test_the_truth_is_float64():
    with pytest.raises(AssertionError):
        judge(torch.zeros(3), torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_random_weights(form, scale_dtype):
    """Packed data hold every byte, padding included. Scales have both signs. A seed determines the weight."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return random_weight(64, 200, CPU, form.scheme, form.group_size, scale_dtype, generator, form.bits)

    weight = draw(1)
    assert weight.shape == (64, 200) and Form(weight.scheme, weight.group_size, weight.bits) == form
    assert weight.scales.shape == (group_count(200, form.group_size), 64) and weight.scales.dtype == scale_dtype
    assert weight.packed.unique().numel() == 256 and weight.packed[:, 26 * form.bits :].unique().numel() > 200
    assert (weight.float_scales() < 0).any() and (weight.float_scales() > 0).any()
    assert 0.005 < float(decode(weight).square().mean().sqrt()) < 0.5
    for same, other in zip(draw(1).tensors().values(), draw(2).tensors().values(), strict=True):
        assert any(torch.equal(same, tensor) for tensor in weight.tensors().values())
        assert not torch.equal(same, other)


def test_random_weights_for_nothing_but_a_device():
    torch.manual_seed(0)
    first = random_weight(3, 70, CPU)
    assert first.scheme == "symmetric" and first.group_size == 64 and first.scales.dtype == torch.float16
    assert not torch.equal(first.packed, random_weight(3, 70, CPU).packed)
