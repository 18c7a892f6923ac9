"""Operands for the parts of the suite, and one NF4 weight in bitsandbytes' form and in ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.accuracy import normal
from mebp_triton.kernels.layout import Int4Weight


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def close(ours: Tensor, theirs: Tensor, relative: float) -> bool:
    """Whether two results differ by at most ``relative`` of theirs, in the Frobenius norm."""
    norm = theirs.double().norm()
    return bool((ours.double() - theirs.double()).norm() <= relative * norm)


def strided(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix whose rows are not contiguous."""
    return normal(*shape[::-1], dtype=dtype, device=device).t()


def clone(weight: Int4Weight) -> Int4Weight:
    """Copies a weight into memory of its own."""
    parts = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    return Int4Weight(in_features=weight.in_features, group_size=weight.group_size, **parts)


def nf4_pair(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any, Int4Weight]:
    """Quantizes a random [N, K] matrix by bitsandbytes, K a multiple of 64.

    Returns:
        Its packed codes, its state, and a weight of ours with the same codes and scales.
    """
    from bitsandbytes import functional

    source = normal(n, k, dtype=dtype, device=device) * 0.02
    packed, state = functional.quantize_4bit(source, blocksize=64, quant_type="nf4")
    pairs = packed.view(n, k // 2)
    # bitsandbytes has a row's first code in the high nibble of its first byte.
    codes = torch.stack((pairs >> 4, pairs & 15), dim=2).view(n, k)
    scales = state.absmax.view(n, k // 64).t().contiguous()
    return packed, state, Int4Weight.from_codes(codes, scales, 64, codebook=state.code.float().to(device))
