"""Configurations are executed as they are compiled: one trip of the main loop is counted."""

from dataclasses import replace

import pytest
import triton

from mebp_triton.autotune import execute
from mebp_triton.autotune.compile import report
from mebp_triton.autotune.emulator.driver import compiler_for
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.execute import TripCounts, trip_counts
from mebp_triton.kernels.configs import Problem, TileConfig

FORWARD = Problem("matmul", 512, 4096, 4096)
TILE = TileConfig(64, 64, 64, num_warps=4, num_stages=3)


def test_one_trip():
    """The tiles of X, of the codes and of the scales are loaded once, and no warp waits for another one's banks."""
    found = trip_counts(FORWARD, TILE, 80)
    tiles = 64 * 64 * 2 + 64 * 32 + 64 * 2
    # Copies write 4 + 1 KiB to shared memory; every warp reads all of X, and its part of the codes.
    assert found == TripCounts(352, 352, tiles / 32, tiles / 32)


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_all_trips_are_alike(kernel, monkeypatch):
    problem, config = Problem(kernel, 512, 4096, 4096), TileConfig(32, 32, 64, num_warps=4, num_stages=2)
    found = trip_counts(problem, config, 80)
    assert 0 < found.least_wavefronts <= found.wavefronts and 0 < found.least_sectors <= found.sectors
    monkeypatch.setattr(execute, "TRIPS", 5)
    assert trip_counts(problem, config, 80) == found
    # A part of a split reduction makes the same trips.
    assert trip_counts(problem, replace(config, split=2), 80) == found


def test_the_kernel_is_the_one_of_the_report(monkeypatch):
    """What does not divide evenly is masked, in the report and where it is counted."""
    compiler_for.cache_clear()
    compiled = []
    real = triton.compile
    monkeypatch.setattr(triton, "compile", lambda source, **options: compiled.append(source) or real(source, **options))
    for problem in (FORWARD, replace(FORWARD, k=4000), replace(FORWARD, kernel="matmul_dx", n=4001, k=4001)):
        report(problem, TILE, 87)
        trip_counts(problem, TILE, 87)
    assert len(compiled) == 3


def test_what_is_not_modelled_is_named():
    with pytest.raises(NotModelled, match=r"tcgen05\.alloc"):
        trip_counts(FORWARD, TILE, 100)
