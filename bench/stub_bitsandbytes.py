"""bitsandbytes' own code for CUDA, on CPU tensors, up to its calls of the compiled library, which do nothing.

Its functions choose between the fused product and dequantising, allocate, and call the library as on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

OPERATIONS = ("bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")


@functools.cache
def cuda_backend() -> tuple[Any, dict[str, Callable[..., Any]]]:
    """The module of its CUDA backend, and what that registers for each operation."""
    import bitsandbytes._ops as declared

    registered: dict[str, Callable[..., Any]] = {}

    def register(name: str, kind: str, *function: Callable[..., Any]) -> Any:
        if not function:
            return functools.partial(register, name, kind)
        registered[name] = function[0]
        return torch.library.register_kernel(name, kind, *function)

    # The backend reads this when it is imported, and torch without CUDA does not have it.
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
    with mock.patch.object(declared, "register_kernel", register):
        from bitsandbytes.backends.cuda import ops
    return ops, registered


class StubLibrary:
    """Stands for the compiled library. Each function that a step calls launches one kernel (csrc/ops.cu)."""

    def __init__(self, launched: Callable[[str], None]) -> None:
        self.launched = launched

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: Any) -> None:
            self.launched(name)

        setattr(self, name, call)
        return call


class StubBitsandbytes(AbstractContextManager["StubBitsandbytes"]):
    """While active, CPU tensors go the way of CUDA tensors in bitsandbytes, and nothing is computed.

    Args:
        device: multiprocessors and compute capability ``(132, 9, 0)``, by which it chooses how to multiply.
        launched: called with a function's name for each launch.
        fused: whether it multiplies by its fused kernel; None for its own choice, which depends on the sizes.

    Attributes:
        implementations: what runs each operation, by name.
    """

    def __init__(
        self, device: tuple[int, int, int], launched: Callable[[str], None], fused: bool | None = None
    ) -> None:
        ops, self.implementations = cuda_backend()
        chosen = {} if fused is None else {"_gemm_4bit_use_custom_fn": lambda *_: fused}
        self.patches = mock.patch.multiple(
            ops,
            lib=StubLibrary(launched),
            _get_raw_stream=lambda index: 0,
            _gpu_dispatch_props=lambda index: device,
            **chosen,
        )

    def __enter__(self) -> StubBitsandbytes:
        self.patches.start()
        self.registration = torch.library.Library("bitsandbytes", "FRAGMENT")
        for name in OPERATIONS:
            torch.library.register_kernel(name, "cpu", self.implementations[name], lib=self.registration)
        return self

    def __exit__(self, *_: object) -> None:
        self.registration._destroy()
        self.patches.stop()
