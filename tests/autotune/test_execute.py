"""Configurations are executed as they are compiled: faults are found, and one trip of the main loop is counted."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
from ptx_mutations import mutations

from mebp_triton.autotune import execute
from mebp_triton.autotune.compile import report
from mebp_triton.autotune.emulator.driver import Emulator, compiler_for
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.execute import TripCounts, fault, trip_counts
from mebp_triton.kernels.configs import Problem, TileConfig

FORWARD = Problem("matmul", 512, 4096, 4096)
TILE = TileConfig(64, 64, 64, num_warps=4, num_stages=3)
SMALL = TileConfig(16, 32, 64, num_warps=4, num_stages=2, split=2)


@pytest.fixture
def compilations(monkeypatch):
    """The kernels that are compiled: none was before."""
    compiler_for.cache_clear()
    names, real = [], triton.compile
    monkeypatch.setattr(
        triton, "compile", lambda source, **rest: names.append(source.fn.__name__) or real(source, **rest)
    )
    return names


def test_what_is_right_has_no_fault(compilations):
    """The launch is the one of the report, and with it come the parts' sum and a launch for three weights."""
    for kernel in ("matmul", "matmul_dx"):
        problem = Problem(kernel, 16, 4096, 4096, "affine", 16, torch.float16, bits=8)
        report(problem, SMALL, 80, rank=64, bias=kernel == "matmul")
        for ragged in (False, True):
            assert fault(problem, SMALL, 80, rank=64, bias=kernel == "matmul", ragged=ragged) is None
        kernels = [name for name in compilations if name != "_sum_parts_kernel"]
        assert kernels == [f"_{kernel}_kernel"] * 2
        compilations.clear()


PLANTED = {
    "barrier removed": r"shared race: .* at line \d+ \(.*\.py:\d+\): .* in matmul bf16 M32 ",
    "guard dropped": r"out of bounds: .* at line \d+ \(.*\.py:\d+\): (ld|st)\.global\S* .* in matmul ",
    "wrong selector": r"wrong result: .* error .*, allowed .* in matmul bf16 M32 N48 K320 symmetric G64 r16 \[16x32x64",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_fault_is_one_line(kind, monkeypatch):
    """It names the kind, the instruction and the case."""

    def edit(ptx):
        planted = [one for one in mutations(ptx) if one.kind == kind] if "mma" in ptx else []
        # The first guards are those of copies, which fill up with zeros what they do not read.
        return planted[-1 if kind == "guard dropped" else 0].apply(ptx) if planted else ptx

    monkeypatch.setattr(execute, "Emulator", partial(Emulator, edit=edit))
    found = fault(Problem("matmul", 16, 4096, 4096), SMALL, 80)
    assert found is not None and "\n" not in found
    assert re.match(PLANTED[kind], found), found


def test_one_trip():
    """The tiles of X and of the codes are loaded once, those of the scales four times, so that a thread has a word."""
    found = trip_counts(FORWARD, TILE, 80)
    tiles = 64 * 64 * 2 + 64 * 32 + 4 * 64 * 2
    # Copies write 4 + 1 KiB to shared memory; every warp reads all of X, and its part of the codes. The copies of the
    # scales take four more, and each warp reads two of them, in two parts: two threads of a row read different ones.
    assert found == TripCounts(352 + 4 + 4 * 2 * 2, 352 + 4 + 4 * 2, 0, tiles / 32, tiles / 32)


def test_one_trip_with_scales_of_two_levels():
    """Besides the tiles and four times a super scale for each row, the sectors of 64 bytes, by four warps.

    Neighbouring threads read different copies of a byte, which keeps the loads copies and costs some conflicts.
    """
    found = trip_counts(FORWARD, TILE, 80, scale_dtype=torch.int8)
    assert found == TripCounts(440, 384, 0, 344, 344) and 344 == (64 * 64 * 2 + 64 * 32 + 4 * 64 * 2) / 32 + 4 * 2


def test_what_tensor_cores_read():
    """Two groups of warps read 64 columns of 64 numbers each; in dX 64 rows as well, which forward has in registers."""
    assert trip_counts(FORWARD, TileConfig(64, 128, 64, num_warps=8), 90).operands == 2 * 64 * 64 * 2 / 128
    tile = TileConfig(64, 64, 128, num_warps=8, weight_left=False)
    assert trip_counts(replace(FORWARD, kernel="matmul_dx"), tile, 90).operands == 2 * (64 + 64) * 64 * 2 / 128


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_all_trips_are_alike(kernel, monkeypatch):
    problem, config = Problem(kernel, 512, 4096, 4096), TileConfig(32, 32, 64, num_warps=4, num_stages=2)
    found = trip_counts(problem, config, 80)
    assert 0 < found.least_wavefronts <= found.wavefronts and 0 < found.least_sectors <= found.sectors
    monkeypatch.setattr(execute, "TRIPS", 5)
    assert trip_counts(problem, config, 80) == found
    # A part of a split reduction makes the same trips.
    assert trip_counts(problem, replace(config, split=2), 80) == found


def test_the_kernel_is_the_one_of_the_report(compilations):
    """What does not divide evenly is masked, in the report, where it is counted and where it is launched."""
    for problem in (FORWARD, replace(FORWARD, k=4000), replace(FORWARD, kernel="matmul_dx", n=4001, k=4001)):
        report(problem, SMALL, 87)
        trip_counts(problem, SMALL, 87)
        assert fault(problem, SMALL, 87) is None
    assert len([name for name in compilations if name != "_sum_parts_kernel"]) == 3


def test_what_is_not_modelled_is_named():
    for execute_it in (trip_counts, fault):
        with pytest.raises(NotModelled, match=r"tcgen05\.alloc"):
            execute_it(FORWARD, TILE, 100)
