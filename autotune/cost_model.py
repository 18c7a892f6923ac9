"""How long a compiled kernel should take: an analytic model that ranks candidates without a GPU.

It counts what one program does (instructions of the main loop, matrix products, bytes) and how many programs a
multiprocessor (SM) holds. Its microseconds order candidates of one device and one problem; they are no measurement, and
no launch ever looks at the nominal figures below.
"""

from __future__ import annotations

from dataclasses import dataclass

from mebp_triton.kernels.configs import Problem, TileConfig

from .compile import StaticReport


@dataclass(frozen=True)
class Device:
    """Nominal figures of one device that stands for its compute capability.

    Attributes:
        name: of the device.
        compute_capability: such as 87.
        sms: multiprocessors.
        clock_ghz: boost clock.
        bandwidth: of its memory, GB/s.
        tensor_fma: dense 16-bit multiply-adds with float32 sums, per SM and clock.
        shared_kib: shared memory per SM.
        l2_mib: second-level cache.
        max_warps: resident per SM.
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


# SMs, clock, bandwidth, cache: the vendor's data sheet or architecture white paper of each (T4 data sheet; A100, GA102,
# AD102, H100 and RTX Blackwell white papers; HGX B200 data sheet; Jetson Orin Nano data sheet, at 15 W). tensor_fma:
# the dense 16-bit rate given there / (2 * SMs * clock). Shared memory and warps: CUDA C++ Programming Guide, technical
# specifications per compute capability.
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

# The same on all of them: schedulers, each of which issues one warp's instruction per clock; registers per SM, and the
# unit they are given in per thread; programs per SM; shared memory that the system takes per program.
SCHEDULERS = 4
REGISTERS = 65_536
REGISTER_UNIT = 8
MAX_PROGRAMS = 24
SHARED_RESERVED = 1024
# Shares of the nominal rate that good code reaches: large products of the vendor's library (and so ours too, as far as
# only the tensor cores limit them), and plain copies.
TENSOR_SHARE = 0.85
MEMORY_SHARE = 0.85
# The warp-wide HMMA reaches only part of the rate where there are newer instructions: sm_90 about 5/8, sm_100 1/4.
HMMA_SHARE = {90: 0.62, 100: 0.25}
# A multiply-add of plain cores takes two issue slots where an SM has 64 of them (sm_75, sm_80); taken for all.
FFMA_SLOTS = 2
# Int-to-float conversions run at 16 lanes per clock and SM: each holds its scheduler for eight slots.
CONVERSION_SLOTS = 8
# Clocks from a request to its data in device memory (microbenchmarks: 500 to 800), and of one trip's chain of dependent
# instructions and barriers (shared memory, unpacking, product: about 30 each), which no pipeline shortens.
MEMORY_LATENCY = 700
TRIP_LATENCY = 150
# Bytes per clock between the second-level cache and one SM, sustained.
L2_BYTES = 32
# Clocks before the first trip and after the last: filling the pipeline, LoRA, storing.
EDGE_LATENCY = 2 * MEMORY_LATENCY
# Between two launches in a stream.
LAUNCH_US = 2.0
# Bytes of a weight: its code, and two bytes of scale for 64 of them.
WEIGHT_BYTES = 0.5 + 2 / 64
# A panel's decoding: issue slots per weight and thread, from unpacking to storing.
DECODE_SLOTS = 2.0
PANEL_WEIGHTS = 1 << 23
# Tile of the vendor's library: fewer tokens cost it as much.
VENDOR_TILE_M = 64


def ceil_div(value: int, by: int) -> int:
    return (value + by - 1) // by


def resident_programs(config: TileConfig, report: StaticReport, device: Device) -> int:
    """How many programs an SM holds at once."""
    registers = ceil_div(report.registers, REGISTER_UNIT) * REGISTER_UNIT * 32 * config.num_warps
    by_shared = device.shared_kib * 1024 // (report.shared_bytes + SHARED_RESERVED)
    return max(1, min(REGISTERS // registers, by_shared, device.max_warps // config.num_warps, MAX_PROGRAMS))


def grid(problem: Problem, config: TileConfig) -> tuple[int, int]:
    """Tiles of the result, and steps of the reduction of each."""
    blocks_m = ceil_div(problem.m, config.block_m)
    blocks_n, blocks_k = ceil_div(problem.n, config.block_n), ceil_div(problem.k, config.block_k)
    return (blocks_m * blocks_n, blocks_k) if problem.kernel == "matmul" else (blocks_m * blocks_k, blocks_n)


def predicted_us(problem: Problem, config: TileConfig, report: StaticReport, device: Device) -> float:
    """Microseconds of a launch with this configuration, and of the second pass of a split reduction."""
    tiles, steps = grid(problem, config)
    per_sm = ceil_div(tiles * config.split, device.sms)
    trips = ceil_div(steps, config.split)
    # Clocks of an SM for one trip of one program, by what limits it.
    issue = _issue_slots(report) * config.num_warps / SCHEDULERS
    tensor = _tensor_clocks(config, report, device)
    step = config.block_k if problem.kernel == "matmul" else config.block_n
    loaded = config.block_n * config.block_k * WEIGHT_BYTES + config.block_m * step * problem.dtype.itemsize
    latency = max(MEMORY_LATENCY / max(config.num_stages - 1, 1), TRIP_LATENCY) + issue / config.num_warps

    def clocks(side_by_side: int) -> float:
        """Of so many programs on one SM. Unpacking and products overlap between warps, not within one."""
        warps = max(side_by_side * config.num_warps / SCHEDULERS, 1)
        compute = max(issue, tensor) + min(issue, tensor) / warps
        return trips * max(side_by_side * max(compute, loaded / L2_BYTES), latency) + EDGE_LATENCY

    resident = min(resident_programs(config, report, device), per_sm)
    rounds, rest = divmod(per_sm, resident)
    total = rounds * clocks(resident) + (clocks(rest) if rest else 0.0)
    elements = problem.n * problem.k * WEIGHT_BYTES + (problem.n + problem.k) * problem.m * problem.dtype.itemsize
    time = max(total / (device.clock_ghz * 1e3), _memory_us(elements, device)) + LAUNCH_US
    return time if config.split == 1 else time + _second_pass_us(problem, config, device)


def _second_pass_us(problem: Problem, config: TileConfig, device: Device) -> float:
    """Writing float32 parts and adding them: through the cache if half of it holds them, else through memory."""
    parts = config.split * problem.m * (problem.n if problem.kernel == "matmul" else problem.k) * 4
    if parts <= device.l2_mib * 2**20 / 2:
        return LAUNCH_US + _cache_us(2 * parts, device)
    return LAUNCH_US + _memory_us(2 * parts, device)


def _issue_slots(report: StaticReport) -> float:
    """Of one warp in one trip; instructions of a lower rate count as more."""
    assert report.loop is not None, "a kernel without a main loop"
    slow = report.loop.matrix * (FFMA_SLOTS - 1) if report.loop.tensor.startswith("FFMA") else 0
    return report.loop.issue_slots + slow + report.loop.conversions * (CONVERSION_SLOTS - 1)


def _tensor_clocks(config: TileConfig, report: StaticReport, device: Device) -> float:
    """Of an SM's tensor cores for one trip of one program."""
    assert report.loop is not None, "a kernel without a main loop"
    tensor = report.loop.tensor
    if tensor.startswith("FFMA"):
        return 0.0
    clocks = config.block_m * config.block_n * config.block_k / (device.tensor_fma * TENSOR_SHARE)
    if tensor == "HMMA":
        return clocks / HMMA_SHARE.get(device.compute_capability, 1.0)
    if not config.weight_left:
        # Both operands come from shared memory at 128 bytes per clock: 64 x 16 values, and 16 x a plane's columns.
        columns = config.block_k // 2
        clocks *= max(1.0, (16 + columns / 4) / (columns / 2))
    return clocks


def _memory_us(moved: float, device: Device) -> float:
    return moved / (device.bandwidth * MEMORY_SHARE * 1e3)


def _cache_us(moved: float, device: Device) -> float:
    return moved / (L2_BYTES * device.sms * device.clock_ghz * 1e3)


def predicted_panel_us(problem: Problem, device: Device) -> float:
    """Microseconds of the panel route: panel after panel is decoded and multiplied by the vendor's library."""
    weights = problem.n * problem.k
    panels = ceil_div(weights, PANEL_WEIGHTS)
    # A panel that the cache does not hold goes out to memory and comes back.
    kept = min(weights, PANEL_WEIGHTS) * 2 <= device.l2_mib * 2**20 / 2
    out = 0 if kept else weights * 2
    per_us = device.sms * device.clock_ghz * 1e3
    decode = max(
        weights * DECODE_SLOTS / 32 / (SCHEDULERS * per_us),
        _cache_us(weights * 2, device),
        _memory_us(weights * WEIGHT_BYTES + out, device),
    )
    tokens = ceil_div(problem.m, VENDOR_TILE_M) * VENDOR_TILE_M
    multiply = max(
        tokens * weights / (device.tensor_fma * TENSOR_SHARE * per_us),
        _cache_us(weights * 2, device),
        _memory_us(out + (problem.n + problem.k) * problem.m * problem.dtype.itemsize, device),
    )
    # LoRA and bias are a launch before the panels; each panel is two.
    launches = 1 + 2 * panels
    return decode + multiply + launches * (LAUNCH_US + EDGE_LATENCY / (device.clock_ghz * 1e3))
