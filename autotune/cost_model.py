"""An analytic model of how long a compiled kernel takes, which ranks candidates without a GPU.

It counts what one program does (instructions of the main loop, matrix products, wavefronts of shared memory, bytes)
and how many programs a multiprocessor (SM) holds. Its microseconds order the candidates of one problem on one device.
They are no measurement, and no launch depends on the nominal figures below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mebp_triton.kernels.configs import Problem, TileConfig

from .compile import StaticReport
from .emulator.counts import SECTOR
from .execute import TripCounts

# What can bound a launch.
Limit = Literal["tensor cores", "shared memory", "issue", "memory", "latency"]
LIMITS: tuple[Limit, ...] = get_args(Limit)


@dataclass(frozen=True)
class Device:
    """Nominal figures of one device, which stands for its compute capability.

    Attributes:
        name: the device's name.
        compute_capability: such as 87.
        sms: number of multiprocessors.
        clock_ghz: boost clock.
        bandwidth: the memory's, in GB/s.
        tensor_fma: dense 16-bit multiply-adds with float32 sums, per SM and clock.
        shared_kib: shared memory per SM.
        l2_mib: second-level cache.
        max_warps: warps that an SM holds at once.
    """

    name: str
    compute_capability: int
    sms: int
    clock_ghz: float
    bandwidth: float
    tensor_fma: int
    shared_kib: int
    l2_mib: float
    max_warps: int


# SMs, clock, bandwidth and cache are from the vendor's data sheets and architecture white papers (T4 data sheet; A100,
# GA102, AD102, H100 and RTX Blackwell white papers; HGX B200 data sheet; Jetson Orin Nano data sheet, at 15 W).
# tensor_fma is the dense 16-bit rate given there / (2 * SMs * clock). Shared memory and warps are from the CUDA C++
# Programming Guide, technical specifications per compute capability.
NOMINAL = {
    device.compute_capability: device
    for device in (
        Device("T4", 75, 40, 1.59, 320, 512, 64, 4, 32),
        Device("A100 SXM 80 GB", 80, 108, 1.41, 2039, 1024, 164, 40, 64),
        Device("RTX 3090", 86, 82, 1.70, 936, 256, 100, 6, 48),
        Device("Jetson Orin Nano 8 GB", 87, 8, 0.625, 68, 1024, 164, 2, 48),
        Device("RTX 4090", 89, 128, 2.52, 1008, 256, 100, 72, 48),
        Device("H100 SXM", 90, 132, 1.83, 3350, 2048, 228, 50, 64),
        Device("B200", 100, 148, 1.85, 8000, 4096, 228, 126, 64),
        Device("RTX 5090", 120, 170, 2.41, 1792, 256, 100, 96, 48),
    )
}

# Figures that all devices share: schedulers per SM, each of which issues one instruction of one warp per clock;
# registers per SM, and the unit in which a thread gets them; programs per SM; shared memory that the system takes per
# program.
SCHEDULERS = 4
REGISTERS = 65_536
REGISTER_UNIT = 8
MAX_PROGRAMS = 24
SHARED_RESERVED = 1024
# Shares of the nominal rates that good code reaches: large products of the vendor's library, and plain copies. Our own
# products are taken to reach the same share where only the tensor cores, or only shared memory, limit them.
TENSOR_SHARE = 0.85
SHARED_SHARE = 0.85
MEMORY_SHARE = 0.85
# On devices with newer instructions, the warp-wide HMMA reaches only a part of the rate.
HMMA_SHARE = {90: 0.62, 100: 0.25}
# A multiply-add without tensor cores takes two issue slots on an SM with 64 cores (sm_75, sm_80), and here on all.
FFMA_SLOTS = 2
# Conversions from integer to float run at 16 lanes per clock and SM, so each holds its scheduler for eight slots.
CONVERSION_SLOTS = 8
# Clocks from a request to its data from device memory (500 to 800 in microbenchmarks), and of one trip's chain of
# dependent instructions and barriers, which no pipeline shortens (shared memory, unpacking, product: about 30 each).
MEMORY_LATENCY = 700
TRIP_LATENCY = 150
# Bytes per clock between the second-level cache and one SM, sustained.
L2_BYTES = 32
# Clocks before the first trip and after the last one: filling the pipeline, LoRA, storing.
EDGE_LATENCY = 2 * MEMORY_LATENCY
# Time between two launches in a stream.
LAUNCH_US = 2.0
# Bytes per weight besides its code: its part of two bytes of scale per 64 weights.
SCALE_BYTES = 2 / 64
# Issue slots per weight and thread of decoding a panel, from unpacking to storing.
DECODE_SLOTS = 2.0
PANEL_WEIGHTS = 1 << 23
# Tokens in a tile of the vendor's library; fewer tokens cost as much.
VENDOR_TILE_M = 64


def ceil_div(value: int, by: int) -> int:
    return (value + by - 1) // by


def resident_programs(config: TileConfig, report: StaticReport, device: Device) -> int:
    """How many programs an SM holds at once."""
    registers = ceil_div(report.registers, REGISTER_UNIT) * REGISTER_UNIT * 32 * config.num_warps
    by_shared = device.shared_kib * 1024 // (report.shared_bytes + SHARED_RESERVED)
    return max(1, min(REGISTERS // registers, by_shared, device.max_warps // config.num_warps, MAX_PROGRAMS))


def grid(problem: Problem, config: TileConfig) -> tuple[int, int]:
    """Number of tiles of the result, and of steps of each tile's reduction."""
    blocks_m = ceil_div(problem.m, config.block_m)
    blocks_n, blocks_k = ceil_div(problem.n, config.block_n), ceil_div(problem.k, config.block_k)
    return (blocks_m * blocks_n, blocks_k) if problem.kernel == "matmul" else (blocks_m * blocks_k, blocks_n)


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a launch, and the clocks of what could bound it.

    Attributes:
        time_us: microseconds.
        clocks: for each of ``LIMITS``, the clocks that the launch would take if nothing else took any: of the tensor
            cores, shared memory and schedulers of the SM that has the most to do, of the way to its data, and of the
            waiting that no pipeline shortens.
    """

    time_us: float
    clocks: Mapping[Limit, float]

    @property
    def bound(self) -> Limit:
        """The limit with the most clocks."""
        return bound_of(self.clocks)


def bound_of(clocks: Mapping[Limit, float]) -> Limit:
    """The limit with the most clocks."""
    return max(clocks, key=lambda limit: clocks[limit])


@dataclass(frozen=True)
class TripClocks:
    """Clocks that an SM needs for one trip of one program at its nominal rates, by what is busy.

    Attributes:
        tensor: the tensor cores.
        wavefronts: shared memory, for the accesses of warps; 0 if nobody has counted them.
        operands: shared memory, for the operands that tensor cores read themselves.
        issue: the schedulers.
    """

    tensor: float
    wavefronts: float
    operands: float
    issue: float

    @property
    def bound(self) -> float:
        """The most clocks of any of them: no trip takes fewer."""
        return max(self.tensor, self.wavefronts + self.operands, self.issue)


def trip_clocks(
    config: TileConfig, report: StaticReport, device: Device, counts: TripCounts | None = None
) -> TripClocks:
    """The clocks of one trip.

    Args:
        config: tile sizes.
        report: of the compiled kernel, which must have a main loop.
        device: the device to predict for.
        counts: of a trip; None if the kernel could not be executed.
    """
    tensor, operands = _tensor_clocks(config, report, device)
    issue = _issue_slots(report) * config.num_warps / SCHEDULERS
    if counts is None:
        return TripClocks(tensor, 0.0, operands, issue)
    return TripClocks(tensor, counts.wavefronts, counts.operands, issue)


def predict(
    problem: Problem, config: TileConfig, report: StaticReport, device: Device, counts: TripCounts | None = None
) -> Prediction:
    """Predicts a launch with this configuration, with the second pass of a split reduction.

    The tensor cores, shared memory (one wavefront per clock) and the schedulers of an SM work side by side for
    different warps, and one after another for the same warp. So with W warps per scheduler, a trip takes the clocks of
    the busiest of the three, and one W-th of the others'. What tensor cores read in shared memory themselves keeps that
    memory busy, but no warp waits for it. A trip lasts no less than the way of its data from the second-level cache,
    and than its chain of dependent steps; the launch no less than the way of all data from memory.

    Args:
        problem, config: what is launched.
        report: of the compiled kernel, which must have a main loop.
        device: the device to predict for.
        counts: of a trip; None if the kernel could not be executed. Shared memory is then taken to cost nothing but the
            instructions.
    """
    tiles, steps = grid(problem, config)
    per_sm = ceil_div(tiles * config.split, device.sms)
    trips = ceil_div(steps, config.split)
    trip = trip_clocks(config, report, device, counts)
    tensor, wavefronts = trip.tensor / TENSOR_SHARE, trip.wavefronts / SHARED_SHARE
    shared, serial = wavefronts + trip.operands / SHARED_SHARE, trip.issue + tensor + wavefronts
    busiest = max(trip.issue, tensor, shared)
    step = config.block_k if problem.kernel == "matmul" else config.block_n
    loaded = config.block_n * config.block_k * _weight_bytes(problem) + config.block_m * step * problem.dtype.itemsize
    if counts is not None:
        loaded += SECTOR * (counts.sectors - counts.least_sectors)
    latency = max(MEMORY_LATENCY / max(config.num_stages - 1, 1), TRIP_LATENCY) + trip.issue / config.num_warps

    def clocks(side_by_side: int) -> float:
        """Clocks of so many programs on one SM."""
        warps = max(side_by_side * config.num_warps / SCHEDULERS, 1)
        compute = busiest + max(serial - busiest, 0) / warps
        return trips * max(side_by_side * max(compute, loaded / L2_BYTES), latency) + EDGE_LATENCY

    def in_rounds(clocks: Callable[[int], float]) -> float:
        """Sums up the rounds in which an SM runs its programs, as many at a time as it holds."""
        resident = min(resident_programs(config, report, device), per_sm)
        rounds, rest = divmod(per_sm, resident)
        return rounds * clocks(resident) + (clocks(rest) if rest else 0.0)

    per_us = device.clock_ghz * 1e3
    elements = (
        problem.n * problem.k * _weight_bytes(problem) + (problem.n + problem.k) * problem.m * problem.dtype.itemsize
    )
    memory_us = _memory_us(elements, device)
    second_us = _second_pass_us(problem, config, device)
    limits: dict[Limit, float] = {
        "tensor cores": per_sm * trips * tensor,
        "shared memory": per_sm * trips * shared,
        "issue": per_sm * trips * trip.issue,
        "memory": max(per_sm * trips * loaded / L2_BYTES, memory_us * per_us),
        "latency": in_rounds(lambda _: trips * latency + EDGE_LATENCY) + LAUNCH_US * per_us,
    }
    return Prediction(max(in_rounds(clocks) / per_us, memory_us) + LAUNCH_US + second_us, limits)


def _second_pass_us(problem: Problem, config: TileConfig, device: Device) -> float:
    """Microseconds of writing float32 parts and adding them, in the cache if half of it holds them, else in memory."""
    if config.split == 1:
        return 0.0
    parts = config.split * problem.m * (problem.n if problem.kernel == "matmul" else problem.k) * 4
    if parts <= device.l2_mib * 2**20 / 2:
        return LAUNCH_US + _cache_us(2 * parts, device)
    return LAUNCH_US + _memory_us(2 * parts, device)


def _issue_slots(report: StaticReport) -> float:
    """Issue slots of one warp in one trip. Instructions of a lower rate count as several."""
    assert report.loop is not None, "a kernel without a main loop"
    slow = report.loop.matrix * (FFMA_SLOTS - 1) if report.loop.tensor.startswith("FFMA") else 0
    return report.loop.issue_slots + slow + report.loop.conversions * (CONVERSION_SLOTS - 1)


def _tensor_clocks(config: TileConfig, report: StaticReport, device: Device) -> tuple[float, float]:
    """Clocks of an SM for one trip of one program: its tensor cores', and shared memory's for what these read there.

    Where nobody counts, the latter are those of one group of warps, whose products are as wide as the tile.
    """
    assert report.loop is not None, "a kernel without a main loop"
    tensor = report.loop.tensor
    if tensor.startswith("FFMA"):
        return 0.0, 0.0
    clocks = config.block_m * config.block_n * config.block_k / device.tensor_fma
    if tensor == "HMMA":
        return clocks / HMMA_SHARE.get(device.compute_capability, 1.0), 0.0
    # The right operand comes from shared memory at 128 bytes per clock, 16 values of each column for 64 rows of the
    # result. So does the left one, 64 x 16 values, but weights of the forward kernel come from registers.
    columns = config.block_m if config.weight_left else config.block_k
    rows = 0 if "dx" not in report.kernel else 64
    return clocks, clocks * (columns + rows) / 4 / (columns / 2)


def _memory_us(moved: float, device: Device) -> float:
    return moved / (device.bandwidth * MEMORY_SHARE * 1e3)


def _cache_us(moved: float, device: Device) -> float:
    return moved / (L2_BYTES * device.sms * device.clock_ghz * 1e3)


def _weight_bytes(problem: Problem) -> float:
    return problem.bits / 8 + SCALE_BYTES


def predict_panel(problem: Problem, device: Device) -> Prediction:
    """Predicts the panel route, which decodes each panel and multiplies it by the vendor's library."""
    weights = problem.n * problem.k
    panels = ceil_div(weights, PANEL_WEIGHTS)
    # A panel that the cache does not hold is written to memory and read again.
    kept = min(weights, PANEL_WEIGHTS) * 2 <= device.l2_mib * 2**20 / 2
    out = 0 if kept else weights * 2
    per_us = device.clock_ghz * 1e3
    decode = weights * DECODE_SLOTS / 32 / (SCHEDULERS * device.sms * per_us)
    tokens = ceil_div(problem.m, VENDOR_TILE_M) * VENDOR_TILE_M
    multiply = tokens * weights / (device.tensor_fma * TENSOR_SHARE * device.sms * per_us)
    activations = (problem.n + problem.k) * problem.m * problem.dtype.itemsize
    moves = (weights * _weight_bytes(problem) + out, out + activations)
    written, read = (max(_cache_us(weights * 2, device), _memory_us(moved, device)) for moved in moves)
    # LoRA's term and the bias are one launch, and each panel is two.
    launches = (1 + 2 * panels) * (LAUNCH_US + EDGE_LATENCY / per_us)
    limits: dict[Limit, float] = {
        "tensor cores": multiply * per_us,
        "issue": decode * per_us,
        "memory": (written + read) * per_us,
        "latency": launches * per_us,
    }
    return Prediction(max(decode, written) + max(multiply, read) + launches, limits)
