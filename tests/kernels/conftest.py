"""Where and how the Triton kernels run in tests: on the GPU if there is one, in Triton's interpreter otherwise.

``triton_kernels`` swaps the compiled functions of the kernel modules for interpreted ones and, after a test module,
swaps them back: nothing is reloaded, no environment variable is set, and the same process can compile kernels too.
The interpreter is made stricter than it is: a masked load without ``other`` gives NaN (a GPU gives garbage), and
every address read or written must lie in a tensor that was passed. ``guarded`` poisons what a launcher allocates.
"""

from __future__ import annotations

import importlib
import mmap
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES, Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 dot works on bit patterns: it is not tested there.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
NORMWISE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MODULES = ("decode", "split", "matmul", "matmul_dx", "embedding", "softmax_tile")
GUARD = 64


def extent(tensor: Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte, and that after its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class CheckedKernel(interpreter.InterpretedFunction):
    """An interpreted kernel; while it runs, ``extents`` are the addresses it may touch."""

    extents: tuple[tuple[int, int], ...] = ()

    def run(self, *args: Any, **kwargs: Any) -> None:
        CheckedKernel.extents = tuple(extent(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        super().run(*args, **kwargs)


class LibraryFunction(interpreter.InterpretedFunction):
    """An interpreted function of the language's own library: its call gives ``triton.language.core`` back as it was.

    The one it replaces leaves the interpreter's functions in it, and nothing compiles in this process any more.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()


def check_addresses(what: str, pointers: Any, mask: Any) -> None:
    itemsize = pointers.get_element_ty().primitive_bitwidth // 8
    touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    inside = np.zeros(touched.shape, dtype=bool)
    for first, stop in CheckedKernel.extents:
        inside |= (touched >= first) & (touched + np.uint64(itemsize) <= stop)
    if not inside.all():
        raise IndexError(f"{what} of {int((~inside).sum())} addresses outside of every tensor passed")


def strict_load(builder: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
    check_addresses("load", pointers, mask)
    loaded = ORIGINAL_LOAD(builder, pointers, mask, other, *options)
    if other is None and not mask.data.all():
        garbage = np.nan if loaded.data.dtype.kind == "f" else 0x5A
        loaded.data = np.where(mask.data, loaded.data, np.array(garbage, dtype=loaded.data.dtype))
    return loaded


def strict_store(builder: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
    check_addresses("store", pointers, mask)
    return ORIGINAL_STORE(builder, pointers, value, mask, *options)


ORIGINAL_LOAD = interpreter.InterpreterBuilder.create_masked_load
ORIGINAL_STORE = interpreter.InterpreterBuilder.create_masked_store


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[None]:
    """Makes the kernels run on this machine, for one test module."""
    if DEVICE == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", strict_load)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", strict_store)
        for name in MODULES:
            interpret(importlib.import_module(f"mebp_triton.kernels.{name}"), patch)
        # Reductions such as tl.max are functions of the language's own library. (Gluon, which a first launch imports,
        # checks them while it is imported.)
        importlib.import_module("triton.experimental.gluon")
        for attribute, function in list(vars(triton.language.standard).items()):
            if isinstance(function, JITFunction):
                library = LibraryFunction(function.fn)
                patch.setattr(triton.language.standard, attribute, library)
                if getattr(triton.language, attribute, None) is function:
                    patch.setattr(triton.language, attribute, library)
        yield


def interpret(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Swaps a module's compiled functions."""
    for attribute, function in list(vars(module).items()):
        if isinstance(function, JITFunction):
            # A device function stays a plain one: it is called with the language patched already.
            interpreted = CheckedKernel(function.fn)
            is_kernel = attribute.endswith("_kernel")
            patch.setattr(module, attribute, interpreted if is_kernel else interpreted.rewrite())


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return request.param


@pytest.fixture(params=GROUP_SIZES)
def group_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., Int4Weight]:
    """``make_weight(n, k, ...)``: random codes; scales of both signs."""

    def make(
        n: int,
        k: int,
        group_size: int = 64,
        scheme: Scheme = "symmetric",
        scale_dtype: torch.dtype = torch.float16,
        seed: int = 0,
    ) -> Int4Weight:
        generator = torch.Generator().manual_seed(seed)
        groups = -(-k // group_size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return Int4Weight.from_codes(
            torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator),
            (0.1 * normal(groups, n)).to(scale_dtype),
            group_size,
            minimum=normal(groups, n).to(scale_dtype) if scheme == "affine" else None,
            codebook=normal(16).sort().values if scheme == "codebook" else None,
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
    """``assert_accurate(name, ours, same, truth)``: against float64, and against torch in the same dtype.

    Our error, as maximum and as RMS, may be twice torch's (and a rounding, as torch's may happen to be none); relative
    to the norm it has a limit of its own.
    """

    def check(name: str, ours: Tensor, same: Tensor, truth: Tensor) -> None:
        assert truth.dtype == torch.float64
        assert ours.shape == truth.shape and ours.dtype == same.dtype, f"{name}: {ours.shape} {ours.dtype}"
        if truth.numel() == 0:
            return
        assert torch.isfinite(ours).all(), f"{name}: not finite"
        error, allowed = ours.double() - truth, same.double() - truth
        eps = torch.finfo(ours.dtype).eps
        for measure, of in (("max", lambda a: a.abs().max()), ("rms", lambda a: a.square().mean().sqrt())):
            limit = 2 * of(allowed) + eps / 2 * of(truth)
            assert of(error) <= limit, f"{name}: {measure} error {of(error):.3g}, limit {limit:.3g}"
        relative = error.norm() / truth.norm()
        assert relative <= NORMWISE[ours.dtype], f"{name}: relative error {relative:.3g}"

    return check


@pytest.fixture(scope="session")
def sparse() -> Callable[[int], Tensor]:
    """``sparse(size)``: that many zero bytes of address space, which cost nothing until they are touched."""

    def make(size: int) -> Tensor:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)

    return make


@pytest.fixture(scope="session")
def guarded() -> Callable[..., Tensor]:
    """``guarded(launcher, ...)``: what it allocates is full of NaN first, and the memory around it stays untouched."""

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
