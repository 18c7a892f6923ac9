"""The model's order of cases whose order is known. Its microseconds are no measurement and not tested."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.compile import SHARED_LIMITS, StaticReport
from mebp_triton.autotune.cost_model import NOMINAL, ceil_div, grid, predicted_panel_us, predicted_us, resident_programs
from mebp_triton.autotune.sass import LoopCounts
from mebp_triton.kernels.configs import Problem, TileConfig


def made(slots=250, matrix=32, registers=100, shared=24_576, tensor="HMMA", target_sm=87, conversions=0):
    loop = LoopCounts(slots, matrix, slots // 2, slots // 6, conversions, tensor)
    limit = SHARED_LIMITS[target_sm]
    return StaticReport("_matmul_kernel", target_sm, registers, 0, shared, limit, loop=loop, conversions=conversions)


TILE = TileConfig(64, 128, 64, num_warps=8, num_stages=3)
SMALL = TileConfig(16, 64, 128, num_warps=4, num_stages=4)


def test_every_target_has_figures():
    assert NOMINAL.keys() == SHARED_LIMITS.keys()
    for target_sm, device in NOMINAL.items():
        assert device.compute_capability == target_sm
        assert SHARED_LIMITS[target_sm] <= device.shared_kib * 1024


@pytest.mark.parametrize(
    ("target_sm", "tflops"), [(75, 65), (80, 312), (86, 71), (87, 10), (89, 165), (90, 989), (100, 2250), (120, 209.5)]
)
def test_rates_are_those_of_the_data_sheets(target_sm, tflops):
    device = NOMINAL[target_sm]
    assert 2 * device.sms * device.clock_ghz * device.tensor_fma / 1e3 == pytest.approx(tflops, rel=0.03)


def test_grid():
    assert grid(Problem("matmul", 65, 4096, 4000), TILE) == (2 * 32, 63)
    assert grid(Problem("matmul_dx", 65, 4096, 4000), TILE) == (2 * 63, 32)
    assert (ceil_div(0, 8), ceil_div(8, 8), ceil_div(9, 8)) == (0, 1, 2)


def test_residency_is_bound_by_the_scarcest():
    device = NOMINAL[87]
    assert resident_programs(TILE, made(registers=128), device) == 2
    assert resident_programs(TILE, made(registers=32), device) == 6  # 48 warps
    assert resident_programs(TILE, made(registers=32, shared=54 * 1024), device) == 2  # and what the system takes
    assert resident_programs(TILE, made(registers=32, shared=1 << 20), device) == 1


@pytest.mark.parametrize(
    "worse",
    [
        {"slots": 800},
        {"registers": 255},
        {"shared": 160_000},
        {"conversions": 64},
    ],
)
def test_what_costs_time(worse):
    problem = Problem("matmul", 512, 4096, 4096)
    assert predicted_us(problem, TILE, made(**worse), NOMINAL[87]) > predicted_us(problem, TILE, made(), NOMINAL[87])


def test_older_instructions_are_slower_where_there_are_newer_ones():
    problem = Problem("matmul", 2048, 4096, 4096)
    for target_sm, tensor in ((90, "HGMMA"), (100, "UTCHMMA")):
        slow, fast = (predicted_us(problem, TILE, made(tensor=kind), NOMINAL[target_sm]) for kind in ("HMMA", tensor))
        assert slow > fast
    assert predicted_us(problem, TILE, made(matrix=2048, slots=2800, tensor="FFMA"), NOMINAL[75]) > predicted_us(
        problem, TILE, made(slots=2800), NOMINAL[75]
    )


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_a_split_pays_for_few_programs_only(kernel):
    device = NOMINAL[90]
    four = replace(SMALL, split=4)
    few, many = Problem(kernel, 16, 1024, 8192), Problem(kernel, 16, 65536, 65536)
    if kernel == "matmul_dx":
        few = Problem(kernel, 16, 8192, 1024)
    assert predicted_us(few, four, made(), device) < predicted_us(few, SMALL, made(), device)
    assert predicted_us(many, four, made(), device) > predicted_us(many, SMALL, made(), device)


def test_one_tile_reaches_memory_speed_at_most():
    """With few tokens, no prediction is below the time that reading a large weight takes."""
    problem, device = Problem("matmul", 16, 65536, 8192), NOMINAL[90]
    assert predicted_us(problem, SMALL, made(slots=1), device) > problem.n * problem.k / 2 / (device.bandwidth * 1e3)


def test_panels_against_tiles():
    """Tiles are far better for few tokens, and panels for many on a device with a fast library and a large cache."""
    for target_sm, device in NOMINAL.items():
        few = Problem("matmul", 16, 4096, 4096)
        tile = predicted_us(few, SMALL, made(slots=250, matrix=16, registers=80, target_sm=target_sm), device)
        assert predicted_panel_us(few, device) > 1.8 * tile
    orin = Problem("matmul", 256, 4096, 4096)
    assert predicted_panel_us(orin, NOMINAL[87]) > predicted_us(orin, TILE, made(), NOMINAL[87])
    hopper = Problem("matmul", 4096, 4096, 4096)
    large = TileConfig(128, 128, 64, num_warps=8, num_stages=3)
    tile = predicted_us(hopper, large, made(tensor="HGMMA", registers=128, target_sm=90), NOMINAL[90])
    assert predicted_panel_us(hopper, NOMINAL[90]) < tile < 1.5 * predicted_panel_us(hopper, NOMINAL[90])


def test_a_panel_that_the_cache_does_not_hold_costs_its_way_through_memory():
    problem, device = Problem("matmul", 16, 8192, 8192), NOMINAL[87]
    large_cache = replace(device, l2_mib=64)
    assert predicted_panel_us(problem, device) > 2 * predicted_panel_us(problem, large_cache)
    assert predicted_panel_us(replace(problem, dtype=torch.float16), device) == predicted_panel_us(problem, device)
