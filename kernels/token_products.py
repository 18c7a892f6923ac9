"""The gradients of LoRA's A and B: products over all tokens, whose sums are kept in float32 or wider.

Three ways lead there. Torch multiplies 16-bit matrices into a float32 result on CUDA; a Triton kernel takes the members
of a group in one launch; and elsewhere both factors are copied into the wide dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .configs import MOST_MEMBERS
from .routing import resolve_backend


def lora_a_gradient(g: Tensor, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Computes ``dA = gᵀ·X``.

    Args:
        g: ``[M, R]``, LoRA's scaled ``dY·B``, those of layers with one input side by side. x: ``[M, K]``, of g's dtype.
        dtype: that of the result.

    Returns:
        ``[R, K]``.
    """
    if _widens(x):
        return torch.mm(g.t(), x, out_dtype=torch.float32).to(dtype)
    if _by_kernel(x, backend):
        made = torch.empty((g.shape[1], x.shape[1]), dtype=dtype, device=x.device)
        _launch([x], [g], [made.t()])
        return made
    return _wide_product(g, _widened(x, dtype), dtype)


def lora_b_gradients(dys: Sequence[Tensor], ts: Sequence[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Computes ``dB_i = dY_iᵀ·t_i``, three of them in one launch where the kernel runs.

    Args:
        dys: ``[M, N_i]`` each. ts: ``[M, R]`` each, LoRA's scaled ``X·A_iᵀ``, slices of one tensor, of one dtype with
            ``dys``.
        dtype: that of the results.

    Returns:
        ``[N_i, R]`` each.
    """
    pairs = list(zip(dys, ts, strict=True))
    if _by_kernel(dys[0], backend):
        outs = [torch.empty((dy.shape[1], t.shape[1]), dtype=dtype, device=dy.device) for dy, t in pairs]
        for start in range(0, len(dys), MOST_MEMBERS):
            members = slice(start, start + MOST_MEMBERS)
            _launch(dys[members], ts[members], outs[members])
        return outs
    if _widens(dys[0]):
        return [torch.mm(dy.t(), t, out_dtype=torch.float32).to(dtype) for dy, t in pairs]
    return [_wide_product(dy, _widened(t, dtype), dtype) for dy, t in pairs]


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which sums of tensors of these dtypes are kept: float32, or float64 if one of them is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype, dtype))


def _wide_product(left: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    return (left.to(wide.dtype).t() @ wide).to(dtype)


def _widens(tensor: Tensor) -> bool:
    """Whether torch multiplies matrices as this one into a float32 result."""
    return tensor.device.type == "cuda" and tensor.itemsize == 2 and _has_wide_products()


@functools.cache
def _has_wide_products() -> bool:
    """Whether torch has them on CUDA: since 2.8, and on ROCm not in every build."""
    return torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def _by_kernel(tensor: Tensor, backend: str) -> bool:
    """Whether the Triton kernel computes a product of matrices as this one. It has no twin for ``torch.compile``."""
    narrow = tensor.itemsize == 2 and not torch.compiler.is_compiling()
    return narrow and resolve_backend(backend, tensor.device, tensor.dtype) == "triton"


def _launch(lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    from .lora_gradients import lora_gradients_triton

    lora_gradients_triton(lefts, rights, outs)
