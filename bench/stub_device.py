"""A device that launches nothing: Triton's own path to a launch on CPU tensors, up to the launch itself.

While ``StubDevice`` is active, ``kernel[grid](...)`` takes the way that it takes on a GPU: the binder, the
specialisation of each argument, the key of the compiled kernel. Nothing is compiled, and where the driver would launch,
the launch is only counted. Outputs keep what memory held before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mebp_triton.kernels.launch import forget_launches
from mebp_triton.kernels.tables import device_architecture


class StubDriver:
    """Triton's driver for a GPU of some compute capability, whose tensors lie on the CPU."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class StubKernel(CompiledKernel):
    """Stands for a compiled kernel that is loaded, whose launch is counted alone."""

    def __init__(self, device: StubDevice, name: str) -> None:
        self.module, self._module_pid = True, -1
        self.src = self.function = self.packed_metadata = None
        self.device, self.name = device, name
        self._run = self.counted

    def counted(self, *_: Any) -> None:
        if driver._active is not self.device.driver:
            raise RuntimeError(f"{self.name} was launched after its stub device was left")
        self.device.launched(self.name)


class StubDevice(AbstractContextManager["StubDevice"]):
    """While active, Triton's kernels on CPU tensors are launched on nothing.

    Args:
        target: the compute capability, by whose tables routes are chosen.
        launched: called with a kernel's name for each launch.
    """

    def __init__(self, target: int, launched: Callable[[str], None] = lambda name: None) -> None:
        if knobs.runtime.interpret:
            raise ValueError("kernels of Triton's interpreter are not launched: unset TRITON_INTERPRET")
        self.driver, self.launched = StubDriver(target), launched
        self.functions: set[JITFunction] = set()

    def __enter__(self) -> StubDevice:
        self._saved, made = (driver._active, JITFunction._do_compile), self

        def compiled(function: JITFunction, key: str, *_: Any, **__: Any) -> Any:
            return made.compiled(function, key)

        driver.set_active(self.driver)
        JITFunction._do_compile = compiled  # type: ignore[method-assign]
        self._forget()
        return self

    def __exit__(self, *_: object) -> None:
        driver._active, JITFunction._do_compile = self._saved
        for function in self.functions:
            function.device_caches.clear()
        self._forget()

    def _forget(self) -> None:
        """Makes the kernels' own code look again at what the driver is."""
        device_architecture.cache_clear()
        forget_launches()

    def compiled(self, function: JITFunction, key: str) -> Any:
        """Makes what stands for a compiled kernel from now on."""
        # A compilation finds the global values that a kernel reads, which each launch compares with what they were.
        name, _ = function.__name__, function.cache_key
        kernel = StubKernel(self, name)
        function.device_caches[0][0][key] = kernel
        self.functions.add(function)
        return kernel
