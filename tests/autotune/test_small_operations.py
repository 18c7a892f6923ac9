"""Cases of the kernels without int4 weights: their twins, and that wrong results of every kind are refused."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.cases import STYLES, Case, Operands
from mebp_triton.autotune.correctness import prepare
from mebp_triton.autotune.small_operations import OPERATIONS
from mebp_triton.kernels.accuracy import PRODUCT_LIMITS

CASES = {
    "rms_norm": Case("rms_norm", m=5, k=70, dtype=torch.float32, layout="padded"),
    "rope": Case("rope", m=5, sizes=(3, 2), k=20, rank=16, split=2, dtype=torch.float32),
    "gated_activation": Case("gated_activation", m=5, sizes=(70,), dtype=torch.float32, layout="offset"),
    "lora_gradients": Case("lora_gradients", m=33, sizes=(70, 5), rank=5, dtype=torch.float32),
}


@pytest.mark.parametrize("kernel", OPERATIONS)
def test_a_twin_is_right_in_every_dtype_and_style(kernel):
    for style in STYLES.get(kernel, ("",)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = replace(CASES[kernel], style=style, dtype=dtype)
            prepared = prepare(case)
            found = OPERATIONS[kernel](case, Operands(case, torch.device("cpu"))).by_torch(dtype)
            assert prepared.judge(found).ok, case
            assert all(one.isfinite().all() for one in found)


@pytest.mark.parametrize(
    ("kernel", "style", "other"),
    [
        ("rms_norm", "once", "offset"),
        ("rope", "forward", "inverse"),
        ("gated_activation", "silu", "gelu"),
        ("gated_activation", "gelu", "gelu_tanh"),
    ],
)
def test_another_style_is_wrong(kernel, style, other):
    case = replace(CASES[kernel], style=style)
    found = prepare(replace(case, style=other)).operation.by_torch(torch.float32)
    assert not prepare(case).judge(found).ok


def test_a_token_that_is_left_out_or_counts_twice_is_wrong():
    prepared = prepare(CASES["lora_gradients"])
    operation = prepared.operation
    for rows in (slice(1, None), slice(None, -1), [*range(33), 32]):
        pairs = zip(operation.lefts, operation.rights, strict=True)
        assert not prepared.judge([left[rows].t() @ right[rows] for left, right in pairs]).ok


def test_a_sum_of_equal_terms_may_have_a_larger_relative_error():
    """Torch's own result is right, although it is farther from the truth than a product of different numbers is."""
    prepared = prepare(replace(CASES["lora_gradients"], m=200, rank=16, sizes=(16, 130, 7), layout="expanded"))
    relative = [
        float((one.double() - truth).norm() / truth.norm())
        for one, truth in zip(prepared.same, prepared.truth, strict=True)
    ]
    assert prepared.judge(prepared.same).ok and max(relative) > PRODUCT_LIMITS[torch.float32]


def test_gradients_of_lora_have_a_dtype_of_their_own():
    for bias, dtype in ((False, torch.float32), (True, torch.float16)):
        prepared = prepare(replace(CASES["lora_gradients"], bias=bias, dtype=torch.float16))
        assert {one.dtype for one in prepared.same} == {dtype} and {one.dtype for one in prepared.truth} == {
            torch.float64
        }
