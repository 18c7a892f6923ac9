"""Results of launches are judged: right ones are accepted, and each kind of wrong one is refused."""

import math

import pytest
import torch

from mebp_triton.autotune.cases import CASE_KERNELS, Case
from mebp_triton.autotune.correctness import check, prepare
from mebp_triton.autotune.emulator.driver import Emulator
from mebp_triton.kernels.accuracy import PRODUCT_LIMITS

CASES = {
    "matmul": Case("matmul", sizes=(70, 20), rank=4, bias=True, layout="padded"),
    "matmul_dx": Case("matmul_dx", sizes=(34, 20), rank=4, dtype=torch.float32),
    "embedding": Case("embedding", m=40, layout="padded"),
    "decode": Case("decode", layout="transposed", dtype=torch.float16),
    "softmax_tile": Case("softmax_tile", sizes=(31, 5), bias=True),
    "split_sums": Case("split_sums", sizes=(5, 0, 1030), split=4),
    "rms_norm": Case("rms_norm", layout="padded", style="offset"),
    "rope": Case("rope", m=5, sizes=(5, 2), k=50, rank=48, split=2, style="inverse"),
    "gated_activation": Case("gated_activation", m=5, layout="offset", dtype=torch.float16),
    "lora_gradients": Case("lora_gradients", m=70, sizes=(40, 3), rank=5),
    "expert_matmul": Case("expert_matmul", m=20, sizes=(0, 18), k=70, rank=4),
    "expert_matmul_dx": Case("expert_matmul_dx", m=20, sizes=(0, 18), k=70, rank=4, dtype=torch.float32),
}


@pytest.mark.parametrize("kernel", CASE_KERNELS)
def test_results_are_judged(kernel):
    prepared = prepare(CASES[kernel])
    with Emulator(80):
        found, again = prepared.launch(), prepared.launch()
    verdict = prepared.judge(found)
    assert verdict.ok and 0 <= verdict.share <= 1 and verdict.reason is None, verdict
    assert prepared.judge(again) == verdict, "a launch changed the operands"
    for index, one in enumerate(found):
        if one.numel() and one.is_floating_point():
            for wrong in (one.flatten()[-1] * 1.1 + 1, math.nan):
                changed = [result.clone() for result in found]
                changed[index][(-1,) * one.dim()] = wrong
                verdict = prepared.judge(changed)
                assert not verdict.ok and verdict.share > 1 and verdict.reason, (index, wrong, verdict)
    if kernel != "softmax_tile":
        assert not prepared.judge([found[0][:-1], *found[1:]]).ok


def test_what_is_not_written_shows(monkeypatch):
    """Without a launch, outputs stay as they were allocated."""
    monkeypatch.setattr(Emulator, "launch", lambda *_: None)
    with Emulator(80):
        for kernel, case in CASES.items():
            assert not check(case).ok, kernel


def test_a_sum_that_cancels_may_have_a_large_relative_error():
    """Torch's own results are right, also where all rows are the same and weights rounded to bfloat16 nearly cancel."""
    cases = [
        Case("matmul", m=70, sizes=(1,), k=208, scheme="codebook", layout="expanded", seed=seed) for seed in range(20)
    ]
    relative = []
    for case in cases:
        prepared = prepare(case)
        assert prepared.judge([prepared.same[0]]).ok, case
        relative.append(float((prepared.same[0].double() - prepared.truth[0]).norm() / prepared.truth[0].norm()))
    assert max(relative) > PRODUCT_LIMITS[torch.bfloat16]
