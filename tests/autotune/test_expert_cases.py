"""Cases of products over experts: their twins, and that wrong results are refused."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.cases import Case, Operands
from mebp_triton.autotune.correctness import prepare
from mebp_triton.autotune.expert_cases import EXPERT_OPERATIONS, blank_expert_launch, in_one_storage
from mebp_triton.kernels.accuracy import random_weight
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.expert_table import ALIGNMENT, Experts
from mebp_triton.kernels.reference import decode

CPU = torch.device("cpu")
CASE = Case("expert_matmul", m=20, sizes=(3, 0, 5), k=70, rank=4, dtype=torch.float32, layout="padded")


@pytest.mark.parametrize("kernel", EXPERT_OPERATIONS)
def test_a_twin_is_right_in_every_dtype(kernel):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        prepared = prepare(replace(CASE, kernel=kernel, dtype=dtype))
        assert prepared.judge(prepared.operation.by_torch(dtype)).ok


@pytest.mark.parametrize("kernel", EXPERT_OPERATIONS)
def test_another_experts_weight_or_adapter_is_wrong(kernel):
    case = replace(CASE, kernel=kernel)
    for name in ("weights", "high"):
        operation = EXPERT_OPERATIONS[kernel](case, Operands(case, CPU))
        setattr(operation, name, [getattr(operation, name)[place] for place in (1, 0, 2)])
        (found,) = operation.by_torch(torch.float32)
        assert not prepare(case).judge([found]).ok
        assert prepare(case).judge([torch.cat((prepare(case).same[0][:3], found[3:]))]).ok


@pytest.mark.parametrize("aligned", [True, False])
def test_weights_are_the_same_in_one_storage(aligned):
    weights = [random_weight(19, 70, CPU, "affine", 32, torch.int8).rows(3, 12) for _ in range(3)]
    moved = in_one_storage(weights, aligned)
    for before, after in zip(weights, moved, strict=True):
        assert torch.equal(decode(before), decode(after))
        for name, tensor in after.tensors().items():
            assert tensor.stride() == getattr(before, name).stride()
            place = tensor.storage_offset() * tensor.element_size()
            assert place % ALIGNMENT == (0 if aligned else tensor.element_size())
    assert len({one.packed.untyped_storage().data_ptr() for one in moved}) == 1


def test_a_blank_launch_has_all_arguments():
    experts = Experts(in_one_storage([random_weight(16, 64, CPU)] * 2))
    for kernel, weight_left in (("matmul", True), ("matmul_dx", False)):
        function, arguments = blank_expert_launch(kernel, experts, 8, TileConfig(16, 16, 64, weight_left=weight_left))
        assert set(function.arg_names) == set(arguments)
