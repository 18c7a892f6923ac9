"""Where and how the Triton kernels run in tests: on the GPU if there is one, in Triton's interpreter otherwise.

``triton_kernels`` swaps the compiled functions of the kernel modules for interpreted ones and, after a test module,
swaps them back: nothing is reloaded, no environment variable is set, and the same process can compile kernels too.
The interpreter is made stricter: a masked load without ``other`` gives NaN (a GPU gives garbage), and every address
that is read or written must lie in a tensor that was passed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 dot works on bit patterns. Without a GPU, ``test_compiled.py`` tests bfloat16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
MODULES = ("decode_bytes", "decode", "weight_tiles", "product_tiles", "split", "matmul", "matmul_dx")
MODULES += ("expert_table", "expert_products", "embedding", "softmax_tile", "rms_norm", "rope", "gated_activation")
MODULES += ("lora_gradients",)


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
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        CheckedKernel.extents = tuple(extent(tensor) for tensor in tensors)
        super().run(*args, **kwargs)


class LibraryFunction(interpreter.InterpretedFunction):
    """An interpreted function of the language's own library, which restores ``triton.language.core`` after a call.

    Triton's own one leaves the interpreter's functions there, and then nothing compiles in this process any more.
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
    # All are imported before the first is changed: one that is imported later would keep the others' swapped functions.
    modules = [importlib.import_module(f"mebp_triton.kernels.{name}") for name in MODULES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", strict_load)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", strict_store)
        for module in modules:
            interpret(module, patch)
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
            # A device function becomes a plain one, because the language is patched already when it is called.
            interpreted = CheckedKernel(function.fn)
            is_kernel = attribute.endswith("_kernel")
            patch.setattr(module, attribute, interpreted if is_kernel else interpreted.rewrite())
