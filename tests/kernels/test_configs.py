"""Tile configurations: what is refused, and that the default suits everything."""

import itertools

import pytest
import torch

from mebp_triton.kernels.configs import KERNELS, TileConfig, default_config, power_of_two_at_least


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
            assert default_config(kernel, m, n, k, group_size, dtype).block_m <= 64


def test_default_wastes_no_tile_on_a_few_tokens():
    assert default_config("matmul", 1, 4096, 4096, 64, torch.float16).block_m == 16
    assert default_config("matmul_dx", 17, 4096, 4096, 64, torch.float16).block_m == 32


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of .* got 'attention'"):
        default_config("attention", 1, 1, 1, 64, torch.float16)
