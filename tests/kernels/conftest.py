"""Fixtures for the tests of the kernels: operands, the rule that judges results, and a guard around a launcher."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE, DTYPES, triton_kernels  # noqa: F401 - a fixture
from torch import Tensor

from mebp_triton.kernels import accuracy
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import FORMS, GROUP_SIZES, SCHEMES, Form, Scheme

GUARD = 64


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return request.param


@pytest.fixture(params=[form for form in FORMS if form.group_size == 32], ids=str)
def kind(request: pytest.FixtureRequest) -> Form:
    """Every scheme with every width of its codes."""
    return request.param


@pytest.fixture(params=GROUP_SIZES)
def group_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., Int4Weight]:
    """``make_weight(n, k, ...)``: a random weight, the same one for the same arguments."""

    def make(
        n: int,
        k: int,
        group_size: int = 64,
        scheme: Scheme = "symmetric",
        scale_dtype: torch.dtype = torch.float16,
        seed: int = 0,
        bits: int = 4,
    ) -> Int4Weight:
        generator = torch.Generator().manual_seed(seed)
        cpu = torch.device("cpu")
        return accuracy.random_weight(n, k, cpu, scheme, group_size, scale_dtype, generator, bits).to(DEVICE)

    return make


@pytest.fixture(scope="session")
def every_byte() -> Callable[..., Int4Weight]:
    """``every_byte(group_size, scheme, scale_dtype, bits)``: ``W[8, 64]`` whose packed form holds each byte.

    Codes of 8 bits have each byte in both planes.
    """

    def make(group_size: int, scheme: Scheme, scale_dtype: torch.dtype, bits: int = 4) -> Int4Weight:
        groups = max(1, 64 // group_size)
        two_level, affine = scale_dtype == torch.int8, scheme == "affine"
        scales = torch.linspace(-0.7, 0.9, 8 * groups).view(groups, 8)
        scales = (scales * 141).to(scale_dtype) if two_level else scales.to(scale_dtype)  # -99 to 127
        supers = torch.linspace(-0.03, 0.02, 8).half().view(1, 8) if two_level else None
        return Int4Weight(
            packed=torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(1, bits // 4),
            scales=scales,
            in_features=64,
            group_size=group_size,
            minimum=scales.flip(1).contiguous() if affine else None,
            codebook=torch.linspace(-1, 1.3, 16) if scheme == "codebook" else None,
            super_scales=supers,
            super_minimum=supers.flip(1).contiguous() if two_level and affine else None,
        ).to(DEVICE)

    return make


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """``normal(*shape, dtype=..., seed=...)``: random normal numbers on the device of the tests."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    return make


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    """``assert_accurate(name, ours, same, truth)``: holds a product against the kernels' rule of correctness."""

    def check(name: str, ours: Tensor, same: Tensor, truth: Tensor) -> None:
        verdict = accuracy.judge(ours, same, truth, product=True)
        assert verdict["ok"], f"{name}: {verdict['reason']}"

    return check


@pytest.fixture(scope="session")
def sparse() -> Callable[[int], Tensor]:
    """``sparse(size)``: a tensor of ``size`` zero bytes that take no memory until they are touched."""

    def make(size: int) -> Tensor:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)

    return make


@pytest.fixture(scope="session")
def guarded() -> Callable[..., Tensor]:
    """``guarded(launcher, ...)``: calls a launcher whose outputs start as NaN, and checks the memory around them."""

    def call(launcher: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        buffers = []

        def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            count = int(np.prod(shape))
            buffer = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
            buffer[:GUARD], buffer[GUARD + count :] = 7.0, 7.0
            buffers.append(buffer)
            return buffer[GUARD : GUARD + count].view(shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            result = launcher(*args, **kwargs)
        assert buffers, "the launcher allocated nothing through torch.empty"
        for buffer in buffers:
            assert (buffer[:GUARD] == 7).all() and (buffer[-GUARD:] == 7).all(), "wrote outside of its output"
        return result

    return call
