"""The model's order of cases whose order is known. Its microseconds are no measurement and not tested."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.compile import SHARED_LIMITS, StaticReport
from mebp_triton.autotune.cost_model import (
    LIMITS,
    NOMINAL,
    ceil_div,
    grid,
    predict,
    predict_panel,
    resident_programs,
    trip_clocks,
)
from mebp_triton.autotune.execute import TripCounts
from mebp_triton.autotune.sass import LoopCounts
from mebp_triton.kernels.configs import Problem, TileConfig


def made(slots=250, matrix=32, registers=100, shared=24_576, tensor="HMMA", target_sm=87, conversions=0):
    loop = LoopCounts(slots, matrix, slots // 2, slots // 6, conversions, tensor)
    limit = SHARED_LIMITS[target_sm]
    return StaticReport("_matmul_kernel", target_sm, registers, 0, shared, limit, loop=loop, conversions=conversions)


def predicted_us(*arguments):
    return predict(*arguments).time_us


def predicted_panel_us(*arguments):
    return predict_panel(*arguments).time_us


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


def test_wider_codes_take_longer_where_memory_is_the_limit():
    for m, tile, least, most in ((16, SMALL, 1.6, 2.0), (4096, TILE, 1.0, 1.2)):
        problem = Problem("matmul", m, 8192, 8192)
        narrow, wide = (predicted_us(one, tile, made(), NOMINAL[87]) for one in (problem, replace(problem, bits=8)))
        assert least * narrow <= wide <= most * narrow


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


def counts(wavefronts=500, sectors=300, least_sectors=300, operands=0):
    return TripCounts(wavefronts, wavefronts, operands, sectors, least_sectors)


def test_shared_memory_bounds_a_launch():
    """One wavefront takes one clock of the SM. More of them do not matter until they are what takes longest."""
    problem, device = Problem("matmul_dx", 512, 4096, 4096), NOMINAL[80]
    config = TileConfig(64, 64, 64, num_warps=8)
    found = [predict(problem, config, made(), device, counts(waves)) for waves in (256, 1216, 2432)]
    assert [one.bound for one in found] == ["issue", "shared memory", "shared memory"]
    assert found[0].time_us < found[1].time_us < found[2].time_us
    assert found[2].clocks["shared memory"] == 2 * found[1].clocks["shared memory"]
    assert found[2].time_us * device.clock_ghz * 1e3 > max(found[2].clocks.values())
    trip = trip_clocks(config, made(slots=250), device, counts(1216))
    assert (trip.tensor, trip.wavefronts, trip.operands, trip.issue, trip.bound) == (256, 1216, 0, 500, 1216)


def test_what_tensor_cores_read_themselves_takes_shared_memory_too():
    problem, config, device = Problem("matmul", 512, 4096, 4096), TileConfig(128, 64, 64), NOMINAL[90]
    few, many = (predict(problem, config, made(tensor="HGMMA"), device, counts(100, operands=n)) for n in (0, 2000))
    assert many.clocks["shared memory"] > few.clocks["shared memory"] and many.time_us > few.time_us
    # If nobody has counted them: of 64 x N x 16 products, 16 x N values, and in dX 64 x 16 more.
    dx = replace(made(tensor="HGMMA"), kernel="_matmul_dx_kernel")
    for tile, report, columns, values in (
        (config, made(tensor="HGMMA"), 128, 16 * 128),
        (TileConfig(64, 64, 128, weight_left=False), dx, 128, 16 * 128 + 64 * 16),
    ):
        trip = trip_clocks(tile, report, device)
        assert trip.operands / trip.tensor == (2 * values / 128) / (64 * columns * 16 / device.tensor_fma)


def test_sectors_that_are_loaded_for_nothing_cost_time():
    problem = Problem("matmul", 512, 4096, 4096)
    fine, wasteful = (predict(problem, TILE, made(), NOMINAL[87], counts(100, sectors)) for sectors in (300, 3000))
    assert wasteful.time_us > fine.time_us and wasteful.bound == "memory" != fine.bound


def test_bounds_of_launches():
    large, small = Problem("matmul", 4096, 4096, 4096), Problem("matmul", 16, 256, 512)
    assert predict(large, TILE, made(slots=50), NOMINAL[87], counts(100)).bound == "tensor cores"
    assert predict(large, TILE, made(slots=900), NOMINAL[87], counts(100)).bound == "issue"
    assert predict(small, SMALL, made(), NOMINAL[90], counts(100)).bound == "latency"
    assert predict(Problem("matmul", 16, 65536, 8192), SMALL, made(slots=1), NOMINAL[90], counts(1)).bound == "memory"
    assert predict_panel(large, NOMINAL[87]).bound == "tensor cores"
    assert set(predict(large, TILE, made(), NOMINAL[87]).clocks) == set(LIMITS)


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
