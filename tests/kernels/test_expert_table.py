"""What a launch over experts knows of them: its table, and which weights it can take."""

import copy
import gc
from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.expert_cases import in_one_storage
from mebp_triton.kernels import expert_table
from mebp_triton.kernels.configs import Problem
from mebp_triton.kernels.expert_table import Experts, experts_of


def joined(weights):
    return experts_of(weights) is not None


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
    first, second = in_one_storage([make_weight(8, 64), make_weight(8, 64)])
    shifted = second.scales.as_strided((1, 8), (8, 1), second.scales.storage_offset() + 4)
    assert Experts([first, second]).aligned and not Experts([first, replace(second, scales=shifted)]).aligned


def test_weights_that_differ_in_nothing_but_their_places_can_be_joined(weights, make_weight):
    assert joined(weights) and joined(weights[:1]) and joined([weights[0], weights[0]])
    assert not joined([make_weight(8, 64), make_weight(8, 64, seed=1)]), "storages of their own"
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
        different = in_one_storage([weights[0], other])
        assert not joined(different), what
        with pytest.raises(ValueError, match="2 weights of several kinds or storages cannot"):
            Experts(different)


def test_a_copy_of_weights_is_described_anew(weights):
    """They lie elsewhere, each in a storage of its own."""
    assert joined(weights) and not joined([copy.deepcopy(weight) for weight in weights])


def test_kinds_that_were_forgotten_are_alike_all_the_same(weights, monkeypatch):
    monkeypatch.setattr(expert_table, "MOST_KNOWN", 1)
    assert joined([replace(weight) for weight in weights])


def test_descriptions_go_with_their_weights(weights):
    assert joined(weights)
    before = len(expert_table._DESCRIBED)
    weights.clear()
    gc.collect()
    assert len(expert_table._DESCRIBED) <= before - 3


def test_the_problem_is_one_weight_with_all_outputs_and_an_experts_tokens(weights):
    experts = Experts(weights)
    assert experts.problem("matmul", 10, torch.float16) == Problem("matmul", 4, 24, 64, "affine", 32, torch.float16)
    dx = Problem("matmul_dx", 4, 8, 192, "affine", 32, torch.float16)
    assert experts.problem("matmul_dx", 10, torch.float16) == dx
