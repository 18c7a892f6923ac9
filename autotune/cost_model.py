"""An analytic model of how long a compiled kernel takes, which ranks candidates without a GPU.

It counts what one program does (instructions of the main loop, matrix products, bytes) and how many programs a
multiprocessor (SM) holds. Its microseconds order the candidates of one problem on one device. They are no measurement,
and no launch depends on the nominal figures below.
"""

from __future__ import annotations

from dataclasses import dataclass

from mebp_triton.kernels.configs import Problem, TileConfig

from .compile import StaticReport


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
# products are taken to reach the same share where only the tensor cores limit them.
TENSOR_SHARE = 0.85
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
# Bytes per weight: its code, and its part of two bytes of scale per 64 weights.
WEIGHT_BYTES = 0.5 + 2 / 64
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


def predicted_us(problem: Problem, config: TileConfig, report: StaticReport, device: Device) -> float:
    """Predicted microseconds of a launch with this configuration, with the second pass of a split reduction."""
    tiles, steps = grid(problem, config)
    per_sm = ceil_div(tiles * config.split, device.sms)
    trips = ceil_div(steps, config.split)
    # Clocks that an SM needs for one trip of one program: to issue its instructions, and to multiply.
    issue = _issue_slots(report) * config.num_warps / SCHEDULERS
    tensor = _tensor_clocks(config, report, device)
    step = config.block_k if problem.kernel == "matmul" else config.block_n
    loaded = config.block_n * config.block_k * WEIGHT_BYTES + config.block_m * step * problem.dtype.itemsize
    latency = max(MEMORY_LATENCY / max(config.num_stages - 1, 1), TRIP_LATENCY) + issue / config.num_warps

    def clocks(side_by_side: int) -> float:
        """Clocks of so many programs on one SM. Unpacking and products overlap between warps, not within one."""
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
    """Microseconds of writing float32 parts and adding them, in the cache if half of it holds them, else in memory."""
    parts = config.split * problem.m * (problem.n if problem.kernel == "matmul" else problem.k) * 4
    if parts <= device.l2_mib * 2**20 / 2:
        return LAUNCH_US + _cache_us(2 * parts, device)
    return LAUNCH_US + _memory_us(2 * parts, device)


def _issue_slots(report: StaticReport) -> float:
    """Issue slots of one warp in one trip. Instructions of a lower rate count as several."""
    assert report.loop is not None, "a kernel without a main loop"
    slow = report.loop.matrix * (FFMA_SLOTS - 1) if report.loop.tensor.startswith("FFMA") else 0
    return report.loop.issue_slots + slow + report.loop.conversions * (CONVERSION_SLOTS - 1)


def _tensor_clocks(config: TileConfig, report: StaticReport, device: Device) -> float:
    """Clocks of an SM's tensor cores for one trip of one program."""
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
    """Predicted microseconds of the panel route, which decodes each panel and multiplies it by the vendor's library."""
    weights = problem.n * problem.k
    panels = ceil_div(weights, PANEL_WEIGHTS)
    # A panel that the cache does not hold is written to memory and read again.
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
    # LoRA's term and the bias are one launch, and each panel is two.
    launches = 1 + 2 * panels
    return decode + multiply + launches * (LAUNCH_US + EDGE_LATENCY / (device.clock_ghz * 1e3))
