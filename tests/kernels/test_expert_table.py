"""What a launch over experts knows of them: its table, and which weights it can take."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.expert_cases import in_one_storage
from mebp_triton.kernels.configs import Problem
from mebp_triton.kernels.expert_table import Experts, can_join


@pytest.fixture
def weights(make_weight):
    return in_one_storage([make_weight(8, 64, 32, "affine", seed=seed) for seed in range(3)])


def test_a_table_has_a_row_for_each_tile(weights, device):
    experts = Experts(weights)
    places = [[getattr(one, name).storage_offset() for name in ("packed", "scales", "minimum")] for one in weights]
    table = experts.table([17, 0, 5], 16)
    assert table.device.type == device and table.dtype == torch.int64
    assert table[:, :3].tolist() == [[0, 17, 0], [16, 17, 0], [17, 22, 2]]
    assert table[:, 3:6].tolist() == [places[0], places[0], places[2]] and not table[:, 6:].any()
    assert experts.table([0, 0, 16], 16)[:, :3].tolist() == [[0, 16, 2]]
    assert experts.table([0, 0, 0], 16).shape == (0, 9)


def test_the_storage_serves_each_tensor_in_its_dtype(weights):
    experts = Experts(weights)
    for one in weights:
        for tensor, flat in zip((one.packed, one.scales, one.minimum), experts.tensors, strict=False):
            begin = tensor.storage_offset()
            assert torch.equal(flat[begin : begin + tensor.numel()], tensor.flatten())
    assert experts.tensors[3:] == (None, None, None)


def test_alignment(weights, make_weight):
    assert Experts(weights).aligned
    assert not Experts(in_one_storage(weights, aligned=False)).aligned
    # The second one's scales begin between words of 16 bytes, all else does not.
    joined = in_one_storage([make_weight(8, 64), make_weight(8, 64)])
    shifted = joined[1].scales.as_strided((1, 8), (8, 1), joined[1].scales.storage_offset() + 4)
    assert Experts(joined).aligned and not Experts([joined[0], replace(joined[1], scales=shifted)]).aligned


def test_weights_that_differ_in_nothing_but_their_places_can_join(weights, make_weight):
    assert can_join(weights) and can_join(weights[:1]) and can_join([weights[0], weights[0]])
    assert not can_join([make_weight(8, 64), make_weight(8, 64, seed=1)]), "storages of their own"
    others = {
        "rows": make_weight(16, 64, 32, "affine"),
        "columns": make_weight(8, 65, 32, "affine"),
        "groups": make_weight(8, 64, 64, "affine"),
        "scheme": make_weight(8, 64, 32),
        "scales": make_weight(8, 64, 32, "affine", torch.float32),
        "bits": make_weight(8, 64, 32, "affine", bits=8),
        "strides": make_weight(9, 64, 32, "affine").rows(0, 8),
    }
    for what, other in others.items():
        assert not can_join(in_one_storage([weights[0], other])), what


def test_the_problem_is_one_weight_with_all_outputs_and_an_experts_tokens(weights):
    experts = Experts(weights)
    assert experts.problem("matmul", 10, torch.float16) == Problem("matmul", 4, 24, 64, "affine", 32, torch.float16)
    dx = Problem("matmul_dx", 4, 8, 192, "affine", 32, torch.float16)
    assert experts.problem("matmul_dx", 10, torch.float16) == dx
