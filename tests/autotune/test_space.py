"""The search space is small, the same every time, and holds nothing that a cheap rule can exclude."""

import itertools

import pytest

from mebp_triton.autotune.compile import report
from mebp_triton.autotune.cost_model import NOMINAL, grid, trip_clocks
from mebp_triton.autotune.execute import trip_counts
from mebp_triton.autotune.space import DX_BALANCED, MATMUL_BALANCED, MIN_STEPS, candidates
from mebp_triton.kernels.configs import Problem, TileConfig, default_config

M = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((128, 1024), (1024, 1024), (4096, 4096), (8192, 2048), (2048, 8192), (131072, 2048))


@pytest.mark.parametrize("target_sm", sorted(NOMINAL))
@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_size_and_order(kernel, target_sm):
    for m in M:
        for n, k in SHAPES:
            problem = Problem(kernel, m, n, k)
            found = candidates(problem, target_sm)
            assert 2 <= len(found) <= 230
            assert len(set(found)) == len(found) and found == candidates(problem, target_sm)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("m", M)
def test_all_suit(m, group_size, scheme):
    for kernel in ("matmul", "matmul_dx"):
        problem = Problem(kernel, m, 4096, 4096, scheme, group_size)
        found = candidates(problem, 90)
        assert all(config.suits(problem) for config in found)
        assert any(config.scale_sums for config in found) == (kernel == "matmul" and scheme == "symmetric" and m <= 32)
        assert all(config.weight_left for config in found) or kernel == "matmul_dx"


def test_tiles_follow_the_problem():
    assert {config.block_m for config in candidates(Problem("matmul", 1, 4096, 4096), 90)} == {16}
    assert {config.block_m for config in candidates(Problem("matmul", 100, 4096, 4096), 87)} == {64, 128}
    assert max(config.block_m for config in candidates(Problem("matmul", 4096, 4096, 4096), 90)) == 256
    assert max(config.block_m for config in candidates(Problem("matmul", 4096, 4096, 4096), 120)) == 128
    assert {config.block_k for config in candidates(Problem("matmul_dx", 16, 4096, 64), 87)} == {64}


def test_a_problem_smaller_than_every_tile_has_a_candidate():
    """Without one, panels would win unopposed."""
    for target_sm in NOMINAL:
        for m, n in itertools.product((16, 64, 128), (16, 48, 64)):
            for problem in (Problem("matmul", m, n, 1024), Problem("matmul_dx", m, n, 1024)):
                assert candidates(problem, target_sm), (problem, target_sm)
    narrow = Problem("matmul", 64, 16, 1024)
    assert candidates(narrow, 87) == [default_config(narrow)]


def balanced():
    for kernel, tiles in (("matmul", MATMUL_BALANCED), ("matmul_dx", DX_BALANCED)):
        for block_m, shapes in tiles.items():
            for out, step, warps in shapes:
                yield kernel, TileConfig(block_m, *((out, step) if kernel == "matmul" else (step, out)), warps)


@pytest.mark.parametrize(("kernel", "config"), list(balanced()), ids=lambda value: getattr(value, "block_m", value))
def test_shared_memory_and_schedulers_keep_up_with_fast_tensor_cores(kernel, config):
    problem = Problem(kernel, 4096, 4096, 4096)
    made, counts = report(problem, config, 80), trip_counts(problem, config, 80)
    assert made.spill_bytes == 0 and counts.wavefronts <= 1.1 * counts.least_wavefronts
    clocks = trip_clocks(config, made, NOMINAL[80], counts)
    assert clocks.bound <= 1.4 * clocks.tensor


def test_orders_of_the_operands():
    def orders(m, target_sm):
        return {config.weight_left for config in candidates(Problem("matmul_dx", m, 4096, 4096), target_sm)}

    assert orders(512, 87) == orders(16, 90) == {True}
    assert orders(512, 90) == orders(512, 100) == {False}


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_splits_fill_the_device_and_no_more(kernel):
    few = Problem(kernel, 16, 1024, 1024)
    assert max(config.split for config in candidates(few, 90)) > 1
    for config in candidates(few, 90):
        tiles, steps = grid(few, config)
        if config.split > 1:
            assert tiles * config.split // 2 < NOMINAL[90].sms and steps >= MIN_STEPS * config.split
    assert {config.split for config in candidates(Problem(kernel, 4096, 4096, 4096), 90)} == {1}
    assert {config.split for config in candidates(Problem(kernel, 16, 4096, 4096), 87)} == {1}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="kernel must be matmul or matmul_dx, got 'embedding'"):
        candidates(Problem("embedding", 16, 64, 64), 87)
    with pytest.raises(ValueError, match=r"target_sm must be one of \[75, .* got 70"):
        candidates(Problem("matmul", 16, 64, 64), 70)
