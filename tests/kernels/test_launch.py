"""Parts of a launch: which weights can share one, their arguments, and the checks of operands."""

import ast

import pytest
import torch
from sources import TREES
from torch._subclasses.fake_tensor import FakeTensorMode

from mebp_triton.kernels import embedding, matmul_dx, softmax_tile, split
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.launch import can_group, check_operand, in_words, is_traced, runs_compiled, weight_arguments
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.matmul import int4_matmul_group_triton, int4_matmul_triton
from mebp_triton.kernels.running_softmax import RunningSoftmax


def meta_weight(n, scheme):
    """A weight on the meta device."""
    scales = torch.empty(4, n, dtype=torch.float16, device="meta")
    packed = torch.empty(n, 64, dtype=torch.uint8, device="meta")
    return Int4Weight(packed, scales, 100, 32, torch.empty_like(scales) if scheme == "affine" else None)


def launches_without_fusion_named(tree):
    """Launches, ``kernel[grid](...)``, that leave it to Triton's version whether multiply-adds are fused."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            given = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func.value).endswith("_kernel") and not given & {
                "enable_fp_fusion",
                "config.launch_options()",
            }:
                yield ast.unparse(node.func)


def test_every_launch_says_whether_multiply_adds_are_fused():
    kernels = [tree for path, tree in TREES.items() if path.parts[0] == "kernels"]
    assert not [name for tree in kernels for name in launches_without_fusion_named(tree)]
    planted = ast.parse("_a_kernel[(1,)](x, num_warps=4)\n_b_kernel[grid](x, enable_fp_fusion=True)")
    assert list(launches_without_fusion_named(planted)) == ["_a_kernel[1,]"]


def test_what_cannot_share_a_launch(make_weight, normal):
    weight = make_weight(20, 100, 32)
    others = {
        "other group size": make_weight(20, 100, 64),
        "other width": make_weight(20, 101, 32),
        "other bits": make_weight(20, 100, 32, bits=8),
        "other scheme": make_weight(20, 100, 32, "affine"),
        "other scales": make_weight(20, 100, 32, scale_dtype=torch.float32),
        "two levels": make_weight(20, 100, 32, scale_dtype=torch.int8),
    }
    assert can_group([weight, make_weight(3, 100, 32)]) and not can_group([])
    assert not can_group([weight] * 4)
    for name, other in others.items():
        assert not can_group([weight, other]), name
        with pytest.raises(ValueError, match="cannot share a launch"):
            int4_matmul_group_triton(normal(5, 100), [weight, other])
    assert can_group([make_weight(20, 100, 32, "codebook", seed=seed) for seed in range(3)])


def test_arguments_of_a_group():
    """A group of two repeats its last member, without rows. A weight alone is followed by None."""
    one, other = meta_weight(20, "affine"), meta_weight(33, "affine")
    alone, pair = weight_arguments([one]), weight_arguments([one, other])
    assert (alone["MEMBERS"], pair["MEMBERS"]) == (1, 2)
    assert (alone["N_of"], pair["N_of"]) == ((20, 0, 0), (20, 33, 0))
    for name in ("packed", "scales", "minimum"):
        mine, others = getattr(one, name), getattr(other, name)
        assert alone[f"{name}_of"] == (mine, None, None)
        assert all(a is b for a, b in zip(pair[f"{name}_of"], (mine, others, others), strict=True))
    assert alone["codebook_of"] == pair["codebook_of"] == (None, None, None)
    assert (pair["stride_sg_of"], pair["stride_zg_of"]) == ((20, 33, 33), (20, 33, 33))
    assert (alone["stride_sg_of"], alone["stride_zg_of"]) == ((20, 0, 0), (20, 0, 0))
    assert pair["HAS_MINIMUM"] and not pair["HAS_CODEBOOK"] and pair["GROUP"] == 32
    assert weight_arguments([meta_weight(20, "symmetric")])["stride_zg_of"] == (0, 0, 0)


def test_arguments_of_two_levels(make_weight):
    one, other = (make_weight(n, 600, 32, "affine", torch.int8) for n in (20, 33))
    pair = weight_arguments([one, other.rows(1, 10)])
    for name in ("super_scales", "super_minimum"):
        assert pair[f"{name}_of"][0] is getattr(one, name) and pair[f"{name}_of"][1].shape == (3, 9)
    assert (pair["stride_ug_of"], pair["stride_vg_of"]) == ((20, 33, 33), (20, 33, 33))
    assert (pair["stride_un"], pair["stride_vn"]) == (1, 1)
    alone = weight_arguments([make_weight(20, 100, 32)])
    assert alone["super_scales_of"] == (None, None, None) and alone["stride_ug_of"] == (0, 0, 0)


def test_scales_in_whole_words(make_weight):
    even = make_weight(20, 100, 32, "affine")
    assert in_words([even]) and in_words([even, make_weight(6, 100, 32, "affine")])
    assert in_words([even.rows(2, 20)]) and not in_words([even.rows(1, 19)]), "the first row begins within a word"
    assert not in_words([even, make_weight(7, 100, 32, "affine")])
    assert in_words([make_weight(7, 100, 32, scale_dtype=torch.float32)])
    assert in_words([make_weight(20, 600, 32, scale_dtype=torch.int8)])
    assert not in_words([make_weight(6, 600, 32, scale_dtype=torch.int8)])


def test_operands_are_checked():
    cpu = torch.device("cpu")
    check_operand("x", torch.zeros(3, 4), (3, 4), cpu)
    for tensor, message in (
        (torch.zeros(4, 3), r"x must have shape \(3, 4\), got \(4, 3\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "x must be one of .* got torch.int64"),
        (torch.zeros(3, 4, device="meta"), "x must be on cpu, where the weight is, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            check_operand("x", tensor, (3, 4), cpu)


def test_assembly_is_for_what_is_compiled_for_nvidia(monkeypatch):
    assert not runs_compiled(lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert runs_compiled(split._sum_parts_kernel)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not runs_compiled(split._sum_parts_kernel)


def test_nothing_is_launched_in_a_trace_without_data():
    """What a launch would write, and what it needs meanwhile, is allocated all the same."""
    assert not is_traced(torch.empty(3))
    with FakeTensorMode():
        assert is_traced(torch.empty(3))
        weight = Int4Weight(torch.empty(70, 64, dtype=torch.uint8), torch.empty(2, 70, dtype=torch.float16), 128, 64)
        assert int4_matmul_triton(torch.empty(33, 128), weight, config=TileConfig(16, 32, 64, split=2)).is_cpu
        assert matmul_dx.int4_matmul_dx_triton(torch.empty(33, 70), weight).shape == (33, 128)
        assert embedding.int4_embedding_triton(torch.zeros(5, dtype=torch.int64), weight, torch.float16).shape[1] == 128
        softmax = RunningSoftmax(torch.zeros(5, dtype=torch.int64), torch.float32, 1.0)
        assert softmax_tile.update_softmax(softmax, torch.empty(5, 70), None, 0)[1].shape == (5, 1)
