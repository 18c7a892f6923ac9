"""Tile configurations: values that are refused, and the default, which suits every problem."""

import itertools

import pytest
import torch

from mebp_triton.kernels.configs import KERNELS, Problem, TileConfig, default_config, power_of_two_at_least


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"block_m": 8}, "block_m must be an integer >= 16, got 8"),
        ({"block_n": 48}, "block_n must be a power of two, got 48"),
        ({"block_k": 32}, "block_k must be an integer >= 64, got 32"),
        ({"block_k": 192}, "block_k must be a power of two, got 192"),
        ({"num_warps": 3}, "num_warps must be a power of two, got 3"),
        ({"num_warps": 0}, "num_warps must be an integer >= 1, got 0"),
        ({"num_stages": 0}, "num_stages must be an integer >= 1, got 0"),
        ({"block_m": 16.0}, "block_m must be an integer"),
        ({"block_m": True}, "block_m must be an integer"),
        ({"split": 3}, "split must be a power of two, got 3"),
        ({"split": 0}, "split must be an integer >= 1, got 0"),
        ({"weight_left": 1}, "weight_left must be true or false, got 1"),
        ({"scale_sums": None}, "scale_sums must be true or false, got None"),
    ],
)
def test_mistakes_are_named(replace, message):
    with pytest.raises(ValueError, match=message):
        TileConfig(**{"block_m": 16, "block_n": 16, "block_k": 64, **replace})


def test_any_depth_of_pipeline():
    assert TileConfig(16, 16, 64, num_stages=3).num_stages == 3


def test_frozen_and_comparable():
    config = TileConfig(16, 32, 64)
    assert config == TileConfig(16, 32, 64) and hash(config) == hash(TileConfig(16, 32, 64))
    with pytest.raises(AttributeError):
        config.block_m = 32


def test_fusion_is_pinned():
    assert TileConfig(16, 16, 64, 8, 2).launch_options() == {
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": False,
    }


@pytest.mark.parametrize(("value", "wanted"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (5000, 128)])
def test_power_of_two(value, wanted):
    assert power_of_two_at_least(value) == wanted


@pytest.mark.parametrize("kernel", KERNELS)
def test_default_works_for_every_shape(kernel):
    sizes = (1, 15, 16, 17, 576, 151_936, 2**31 - 1)
    for m, n, k in itertools.product((0, *sizes), sizes, sizes):
        for group_size, dtype in itertools.product((32, 64, 128), (torch.float32, torch.float16, torch.bfloat16)):
            problem = Problem(kernel, m, n, k, "symmetric", group_size, dtype)
            assert default_config(problem).block_m <= 64 and default_config(problem).suits(problem)


def test_default_wastes_no_tile_on_a_few_tokens():
    assert default_config(Problem("matmul", 1, 4096, 4096)).block_m == 16
    assert default_config(Problem("matmul_dx", 17, 4096, 4096)).block_m == 32


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of .* got 'attention'"):
        default_config(Problem("attention", 1, 1, 1))


@pytest.mark.parametrize(
    ("kernel", "scheme", "group_size", "block_k", "suits"),
    [
        ("matmul", "symmetric", 64, 64, True),
        ("matmul", "symmetric", 128, 128, True),
        ("matmul", "symmetric", 32, 64, True),
        ("matmul", "symmetric", 64, 128, False),
        ("matmul", "symmetric", 32, 128, False),
        ("matmul", "affine", 64, 64, False),
        ("matmul", "codebook", 64, 64, False),
        ("matmul_dx", "symmetric", 64, 64, False),
    ],
)
def test_sums_are_scaled_only_within_a_group(kernel, scheme, group_size, block_k, suits):
    problem = Problem(kernel, 16, 4096, 4096, scheme, group_size)
    assert TileConfig(16, 64, block_k, scale_sums=True).suits(problem) == suits
    assert TileConfig(16, 64, block_k).suits(problem)
