"""Executes a configuration on the emulator, without a device: is its result right, and what does one trip cost?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mebp_triton.kernels.configs import MOST_MEMBERS, Problem, TileConfig

from .cases import tile_case
from .compile import blank_launch
from .correctness import check
from .emulator.counts import Access, Counts
from .emulator.driver import Emulator
from .emulator.faults import Fault
from .emulator.parser import Vector

# Threads that execute a ``wgmma`` together.
GROUP_THREADS = 128
# Trips that are counted. Before them, as many trips as the pipeline has stages fill and drain it.
TRIPS = 2


@dataclass(frozen=True)
class TripCounts:
    """Amounts that one block moves in one trip of the main loop.

    Attributes:
        wavefronts: of shared memory, which moves one per clock, for the accesses of its warps.
        least_wavefronts: how many there would be without bank conflicts.
        operands: wavefronts of what tensor cores read there themselves (``wgmma``).
        sectors: 32-byte parts of global memory that its warps load.
        least_sectors: how many would hold the bytes that are loaded.
    """

    wavefronts: float
    least_wavefronts: float
    operands: float
    sectors: float
    least_sectors: float


def fault(
    problem: Problem,
    config: TileConfig,
    target_sm: int,
    rank: int = 16,
    bias: bool = False,
    ragged: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> str | None:
    """Launches a configuration on a small problem, see ``cases.tile_case``, and judges the result.

    Args:
        problem: ``matmul`` or ``matmul_dx``; its scheme, group size and dtype are taken.
        config: tile sizes, with the split that is to be launched.
        target_sm: compute capability.
        rank: LoRA's rank, per weight.
        bias: whether ``matmul`` adds a bias.
        ragged: whether three weights have one input, and 16 divides no size. If not, one weight is launched, with sizes
            for which ``compile.report`` has compiled the code.
        scale_dtype: see ``report``.

    Returns:
        What is wrong, in one line: a wrong result and by how much, or the kind of fault with the instruction, its line
        of PTX and of Python; None if nothing is.

    Raises:
        NotModelled: the emulator does not know an instruction.
    """
    case = tile_case(
        problem.kernel,  # type: ignore[arg-type]
        config,
        aligned=not ragged,
        members=MOST_MEMBERS if ragged else 1,
        scheme=problem.scheme,
        group_size=problem.group_size,
        dtype=problem.dtype,
        scale_dtype=scale_dtype,
        rank=rank,
        bias=bias,
        bits=problem.bits,
    )
    if not ragged:
        sizes = tuple(size + rest(problem.n, config.block_n) for size in case.sizes)
        case = replace(case, sizes=sizes, k=case.k + rest(problem.k, config.block_k))
    try:
        with Emulator(target_sm):
            verdict = check(case)
    except Fault as error:
        return " ".join(f"{error} in {case}".split())
    return None if verdict.ok else f"wrong result: {verdict.reason} in {case}"


def trip_counts(
    problem: Problem, config: TileConfig, target_sm: int, scale_dtype: torch.dtype = torch.float16
) -> TripCounts:
    """Counts one trip, by executing one block with a short reduction and with one that is ``TRIPS`` trips longer.

    The kernel is the one of ``compile.report``, and is not compiled again. Counting takes about a tenth of the time of
    compiling.

    Args:
        problem: ``matmul`` or ``matmul_dx``. Of its sizes only that matters which ``report`` looks at.
        config: tile sizes.
        target_sm: compute capability.
        scale_dtype: see ``report``.

    Raises:
        NotModelled: the emulator does not know an instruction.
    """
    short, long = (_one_block(problem, config, target_sm, config.num_stages + more, scale_dtype) for more in (0, TRIPS))

    def per_trip(of: Callable[[Counts], float]) -> float:
        return (of(long) - of(short)) / TRIPS

    def loads(counts: Counts) -> list[Access]:
        return [access for access in counts.to_global.values() if access.instruction.parts[0] in ("ld", "cp")]

    return TripCounts(
        per_trip(lambda counts: sum(access.parts for access in counts.to_shared.values())),
        per_trip(lambda counts: sum(access.least for access in counts.to_shared.values())),
        per_trip(_operand_wavefronts),
        per_trip(lambda counts: sum(access.parts for access in loads(counts))),
        per_trip(lambda counts: sum(access.least for access in loads(counts))),
    )


def _operand_wavefronts(counts: Counts) -> float:
    """Wavefronts of 128 bytes that ``wgmma`` reads: 32 bytes of each column, and of 64 rows if registers have none."""
    total = 0.0
    for one, executed in zip(counts.kernel.code, counts.executed, strict=True):
        if one.name.startswith("wgmma.mma_async"):
            columns = int(one.name.partition(".m64n")[2].partition("k")[0])
            rows = 0 if isinstance(one.operands[1], Vector) else 64
            total += int(executed) * counts.kernel.threads / GROUP_THREADS * (columns + rows) * 32 / 128
    return total


def _one_block(problem: Problem, config: TileConfig, target_sm: int, trips: int, scale_dtype: torch.dtype) -> Counts:
    """Counts the first block of a launch whose reduction has so many trips, and the first part of a split one."""
    cut = _cut(problem, config, trips * config.split)
    kernel, arguments = blank_launch(cut, config, scale_dtype=scale_dtype, device="cpu")
    emulator = Emulator(target_sm, count=True, check=False)
    emulator.launch(kernel, (1,), (), {**arguments, **config.launch_options()})
    counts = emulator.launches[0].counts
    assert counts is not None
    return counts


def _cut(problem: Problem, config: TileConfig, trips: int) -> Problem:
    """A problem of one tile and so many whole trips that is specialised like the real one."""
    forward = problem.kernel == "matmul"
    n = config.block_n * (1 if forward else trips) + rest(problem.n, config.block_n)
    k = config.block_k * (trips if forward else 1) + rest(problem.k, config.block_k)
    return replace(problem, m=config.block_m, n=n, k=k)


def rest(size: int, block: int) -> int:
    """Returns what makes whole blocks a size that ``block`` and 16 divide if they divide ``size``: 0, 16 or 1."""
    return 0 if size % block == 0 else 16 if size % 16 == 0 else 1
