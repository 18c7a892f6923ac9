"""Executes a configuration on the emulator, without a device, and counts what one trip of its main loop does."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mebp_triton.kernels.configs import Problem, TileConfig

from .compile import blank_launch
from .emulator.counts import Access, Counts
from .emulator.driver import Emulator

# Trips that are counted. Before them, as many trips as the pipeline has stages fill and drain it.
TRIPS = 2


@dataclass(frozen=True)
class TripCounts:
    """What one block moves in one trip of the main loop.

    Attributes:
        wavefronts: of shared memory, which moves one per clock. Operands that tensor cores read there themselves
            (``wgmma``) are not among them.
        least_wavefronts: how many there would be without bank conflicts.
        sectors: 32-byte parts of global memory that its warps load.
        least_sectors: how many would hold the bytes that are loaded.
    """

    wavefronts: float
    least_wavefronts: float
    sectors: float
    least_sectors: float


def trip_counts(problem: Problem, config: TileConfig, target_sm: int) -> TripCounts:
    """Counts one trip, by executing one block with a short reduction and with one that is ``TRIPS`` trips longer.

    The kernel is the one of ``compile.report``, and is not compiled again. Counting takes about a tenth of the time of
    compiling.

    Args:
        problem: ``matmul`` or ``matmul_dx``. Of its sizes only that matters which ``report`` looks at.
        config: tile sizes.
        target_sm: compute capability.

    Raises:
        NotModelled: the emulator does not know an instruction.
    """
    short, long = (_one_block(problem, config, target_sm, config.num_stages + more) for more in (0, TRIPS))

    def loads(counts: Counts) -> list[Access]:
        return [access for access in counts.to_global.values() if access.instruction.parts[0] in ("ld", "cp")]

    def per_trip(name: str, before: list[Access], after: list[Access]) -> float:
        return (sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before)) / TRIPS

    shared = list(short.to_shared.values()), list(long.to_shared.values())
    loaded = loads(short), loads(long)
    return TripCounts(
        per_trip("parts", *shared), per_trip("least", *shared), per_trip("parts", *loaded), per_trip("least", *loaded)
    )


def _one_block(problem: Problem, config: TileConfig, target_sm: int, trips: int) -> Counts:
    """Counts the first block of a launch whose reduction has so many trips, and the first part of a split one."""
    kernel, arguments = blank_launch(_cut(problem, config, trips * config.split), config, device="cpu")
    emulator = Emulator(target_sm, count=True, check=False)
    emulator.launch(kernel, (1,), (), {**arguments, **config.launch_options()})
    counts = emulator.launches[0].counts
    assert counts is not None
    return counts


def _cut(problem: Problem, config: TileConfig, trips: int) -> Problem:
    """A problem of one tile and so many whole trips that is specialised like the real one."""

    def like(size: int, block: int, blocks: int) -> int:
        return block * blocks + (0 if size % block == 0 else 16 if size % 16 == 0 else 1)

    forward = problem.kernel == "matmul"
    n = like(problem.n, config.block_n, 1 if forward else trips)
    k = like(problem.k, config.block_k, trips if forward else 1)
    return replace(problem, m=config.block_m, n=n, k=k)
