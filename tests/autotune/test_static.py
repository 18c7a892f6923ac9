"""Compiling for GPUs that are not there: what the default configurations cost on each."""

import pytest
import torch
import triton
import triton.language as tl

from mebp_triton.autotune.static import SHARED_LIMITS, StaticReport, compile_for, report, specialize
from mebp_triton.kernels.configs import KERNELS, TileConfig, default_config
from mebp_triton.kernels.layout import SCHEMES

M, N, K = 512, 4096, 4096
OPTIONS = TileConfig(16, 16, 64, num_warps=4, num_stages=2).launch_options()


def natural_dtype(target_sm: int) -> torch.dtype:
    """The 16-bit dtype one trains in there; before sm_80 there is no bfloat16."""
    return torch.bfloat16 if target_sm >= 80 else torch.float16


def assert_good(made: StaticReport) -> None:
    assert made.fits, f"{made.shared_bytes} bytes of shared memory, limit {made.shared_limit}"
    assert made.spill_bytes == 0
    assert 0 < made.registers <= 255


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target_sm", sorted(SHARED_LIMITS))
def test_default_on_every_target(kernel, target_sm):
    dtype = natural_dtype(target_sm)
    config = default_config(kernel, M, N, K, 64, dtype)
    made = report(kernel, config, target_sm, dtype, rank=16)
    assert made.kernel == f"_{kernel}_kernel" and made.target_sm == target_sm
    assert_good(made)
    assert made.shared_bytes <= SHARED_LIMITS[75]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target_sm", [75, 87])
def test_schemes(kernel, target_sm, scheme):
    """Masks along K, two scales per chunk, float32 scales, a bias, and the largest rank."""
    dtype = natural_dtype(target_sm)
    config = default_config(kernel, M, N, K + 8, 32, dtype)
    assert_good(
        report(
            kernel, config, target_sm, dtype, scheme, 32, 64, bias=True, scale_dtype=torch.float32, m=M, n=N, k=K + 8
        )
    )


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("m", [1, 32])
def test_few_tokens(kernel, m):
    config = default_config(kernel, m, N, K, 128, torch.bfloat16)
    assert_good(report(kernel, config, 87, torch.bfloat16, group_size=128, m=m))


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("target_sm", [75, 90])
def test_float32(kernel, target_sm):
    config = default_config(kernel, M, N, K, 64, torch.float32)
    assert_good(report(kernel, config, target_sm, torch.float32, rank=16))


def test_too_much_shared_memory_is_seen():
    config = TileConfig(128, 128, 128, num_warps=8, num_stages=4)
    assert not report("matmul", config, 86, torch.bfloat16).fits
    assert report("matmul", config, 90, torch.bfloat16).fits


def test_spills_are_seen():
    # No tensor cores there: products of so large a tile do not fit into registers.
    assert report("matmul", TileConfig(64, 64, 64, num_warps=4), 75, torch.float16).spill_bytes > 0


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, stride_x, scale_ptr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs_n * stride_x, mask=offs_n < N, other=0.0)
    tl.store(y_ptr + offs_n, x, mask=offs_n < N)


def copy_arguments(**replace):
    x = torch.empty(64, device="meta")
    return {"x_ptr": x, "y_ptr": x.half(), "N": 64, "stride_x": 1, "scale_ptr": None, "BLOCK_N": 64, **replace}


def test_specialisation_is_that_of_a_launch():
    signature, constants, attributes = specialize(_copy_kernel, copy_arguments(N=2**31))
    assert signature == {
        "x_ptr": "*fp32",
        "y_ptr": "*fp16",
        "N": "i64",
        "stride_x": "constexpr",
        "scale_ptr": "constexpr",
        "BLOCK_N": "constexpr",
    }
    assert constants == {(3,): 1, (4,): None, (5,): 64}
    assert set(attributes) == {(0,), (1,), (2,)}
    signature, constants, attributes = specialize(_copy_kernel, copy_arguments(N=65, stride_x=3))
    assert (signature["N"], signature["stride_x"]) == ("i32", "i32")
    assert set(attributes) == {(0,), (1,)}


def test_any_kernel():
    made = compile_for(_copy_kernel, copy_arguments(), 80, OPTIONS)
    assert made.kernel == "_copy_kernel" and made.spill_bytes == 0 and made.registers < 64


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"target_sm must be one of \[75, .* got 70"):
        compile_for(_copy_kernel, copy_arguments(), 70, OPTIONS)
    with pytest.raises(ValueError, match="kernel must be a JIT function, got function"):
        compile_for(_copy_kernel.fn, copy_arguments(), 80, OPTIONS)
    with pytest.raises(ValueError, match="kernel must be matmul, .* got 'attention'"):
        report("attention", TileConfig(16, 16, 64), 80, torch.float16)
