"""Compiling for GPUs that are not there, and what the default configurations cost on each."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from pairs import pairs
from triton.backends.compiler import GPUTarget

from mebp_triton.autotune.compile import SHARED_LIMITS, StaticReport, compile_for, report
from mebp_triton.kernels.configs import KERNELS, Problem, TileConfig, default_config
from mebp_triton.kernels.names import FORMS, GROUP_SIZES_OF_BITS

M, N, K = 512, 4096, 4096
OPTIONS = TileConfig(16, 16, 64, num_warps=4, num_stages=2).launch_options()


def natural_dtype(target_sm: int) -> torch.dtype:
    """The 16-bit dtype that one trains in on a target. Before sm_80 there is no bfloat16."""
    return torch.bfloat16 if target_sm >= 80 else torch.float16


def assert_good(made: StaticReport) -> None:
    assert made.fits, f"{made.shared_bytes} bytes of shared memory, limit {made.shared_limit}"
    assert made.spill_bytes == 0
    assert 0 < made.registers <= 255


# One target for each kind of matrix instruction. That of sm_80 serves 86, 87 and 89 as well.
@pytest.mark.parametrize(
    ("kernel", "target_sm", "kind", "hard"),
    pairs(
        KERNELS,
        [75, 80, 90, 100, 120],
        [form for form in FORMS if form.group_size == 64],
        [None, torch.float32, torch.int8],
    ),
    ids=str,
)
def test_default_works_everywhere(kernel, target_sm, kind, hard):
    """A hard problem has masks along K, several scales per chunk, of such a dtype, a bias and the largest rank."""
    dtype = natural_dtype(target_sm)
    if hard is not None:
        size = min(GROUP_SIZES_OF_BITS[kind.bits])
        problem, options = (
            Problem(kernel, M, N, K + 8, kind.scheme, size, dtype, kind.bits),
            {"rank": 64, "bias": kernel == "matmul", "scale_dtype": hard},
        )
    else:
        problem, options = Problem(kernel, M, N, K, kind.scheme, 64, dtype, kind.bits), {}
    made = report(problem, default_config(problem), target_sm, **options)
    assert made.kernel == f"_{kernel}_kernel" and made.target_sm == target_sm
    assert_good(made)
    assert made.shared_bytes <= min(SHARED_LIMITS.values())
    assert target_sm == 75 or made.conversions == 0 and made.warnings == ()
    assert (made.loop is None) == (kernel == "embedding")


@pytest.mark.parametrize(("kernel", "m"), [("matmul", 1), ("matmul_dx", 32)])
def test_few_tokens(kernel, m):
    problem = Problem(kernel, m, N, K, group_size=128)
    assert_good(report(problem, default_config(problem), 87, rank=0))


@pytest.mark.parametrize(("kernel", "target_sm"), [("matmul", 75), ("matmul_dx", 90)])
def test_float32(kernel, target_sm):
    problem = Problem(kernel, M, N, K, dtype=torch.float32)
    assert_good(report(problem, default_config(problem), target_sm))


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_split_and_scaled_sums(kernel):
    problem = Problem(kernel, 16, N, K)
    for config in (
        TileConfig(16, 64, 64, split=4),
        TileConfig(16, 64, 64, weight_left=kernel == "matmul", scale_sums=kernel == "matmul"),
    ):
        assert_good(report(problem, config, 90))


@pytest.mark.parametrize(("target_sm", "tensor"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_the_main_loop(target_sm, tensor):
    """The LoRA loop is not taken for the main loop, in which no integer is converted."""
    made = report(Problem("matmul", M, N, K), TileConfig(64, 128, 64, num_warps=8), target_sm)
    assert made.loop is not None and made.loop.tensor == tensor
    assert made.conversions == made.loop.conversions == 0
    decoded = 128 * 64 / (32 * 8)
    assert made.unpacking_per_weight == pytest.approx(made.loop.unpacking / decoded)
    assert 0.7 < made.unpacking_per_weight < 3
    assert (made.tensor_memory > 0) == (target_sm == 100)


def test_weights_decoded_by_several_warps_are_seen():
    """A tile of 32 rows has two runs of 16 for four warps, so each weight is decoded twice."""
    problem = Problem("matmul", 16, N, K)
    twice, once = (report(problem, TileConfig(16, rows, 64), 87).unpacking_per_weight for rows in (32, 64))
    assert once is not None and twice is not None and twice > 1.8 * once


def test_too_much_shared_memory_is_seen():
    """It is no compile error, so the report must say it."""
    made = report(Problem("matmul", M, N, K), TileConfig(64, 64, 128, num_warps=8, num_stages=7), 86)
    assert made.shared_limit == SHARED_LIMITS[86] and not made.fits
    assert replace(made, shared_limit=SHARED_LIMITS[90]).fits


def test_too_much_tensor_memory_is_seen():
    fine = StaticReport("_matmul_kernel", 100, 100, 0, 1024, 2048, tensor_memory=512)
    assert fine.fits and not replace(fine, tensor_memory=513).fits


def test_spills_are_seen():
    # Without tensor cores, the products of so large a tile do not fit into registers.
    problem = Problem("matmul", M, N, K, dtype=torch.float16)
    assert report(problem, TileConfig(64, 64, 64, num_warps=4), 75).spill_bytes > 0


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, stride_x, scale_ptr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs_n * stride_x, mask=offs_n < N, other=0.0)
    tl.store(y_ptr + offs_n, x, mask=offs_n < N)


def copy_arguments(**replace):
    x = torch.empty(64, device="meta")
    return {"x_ptr": x, "y_ptr": x.half(), "N": 64, "stride_x": 1, "scale_ptr": None, "BLOCK_N": 64, **replace}


@triton.jit
def _sums_kernel(x_of, N_of, out_ptr, flags, MEMBERS: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    total = tl.load(x_of[0] + offs_n, mask=offs_n < N_of[0], other=0.0)
    if MEMBERS > 1:
        total += tl.load(x_of[1] + offs_n, mask=offs_n < N_of[1], other=0.0)
    tl.store(out_ptr + offs_n, total)


class NoDevice:
    """Answers what Triton asks a driver before it compiles for a launch."""

    target = GPUTarget("cuda", 87, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.mark.parametrize("sizes", [(16,), (16, 7), (5, 1)], ids=str)
def test_a_launch_is_specialised_alike(sizes, monkeypatch):
    """Triton's own launcher derives the same, for tuples and their elements as well."""
    tensors = [torch.zeros(size) for size in sizes]
    arguments = {
        "x_of": (*tensors, *[None] * (2 - len(sizes))),
        "N_of": (*sizes, *[0] * (2 - len(sizes))),
        "out_ptr": torch.zeros(16, dtype=torch.float16),
        "flags": (2**40, 1, None),
        "MEMBERS": len(sizes),
        "BLOCK_N": 16,
    }
    driver = triton.runtime.driver
    before = dict(vars(driver))  # ``reset_active`` fails where there is no device
    driver.set_active(NoDevice())
    try:
        source = _sums_kernel.warmup(**arguments, **OPTIONS, grid=(1,)).src
    finally:
        vars(driver).update(before)

    def described(source):
        return source.signature, source.constants, {path: found for path, found in source.attrs.items() if found}

    sources = []

    def compile(source, **_):
        sources.append(source)
        raise StopIteration

    monkeypatch.setattr(triton, "compile", compile)
    with pytest.raises(StopIteration):
        compile_for(_sums_kernel, arguments, 87, OPTIONS)
    assert [described(ours) for ours in sources] == [described(source)]


def test_any_kernel():
    made = compile_for(_copy_kernel, copy_arguments(), 80, OPTIONS)
    assert made.kernel == "_copy_kernel" and made.spill_bytes == 0 and made.registers < 64


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"target_sm must be one of \[75, .* got 70"):
        compile_for(_copy_kernel, copy_arguments(), 70, OPTIONS)
    with pytest.raises(ValueError, match="kernel must be a JIT function, got function"):
        compile_for(_copy_kernel.fn, copy_arguments(), 80, OPTIONS)
    with pytest.raises(ValueError, match=r"kernel must be one of \('matmul', .* got 'attention'"):
        report(Problem("attention", M, N, K), TileConfig(16, 16, 64), 80)
    with pytest.raises(ValueError, match="config must suit the problem, got TileConfig.*scale_sums=True"):
        report(Problem("matmul", M, N, K, "affine"), TileConfig(16, 16, 64, scale_sums=True), 80)
