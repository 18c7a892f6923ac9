"""The one rule of correctness: how far a result may be from float64 on the decoded codes; and random operands."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .layout import Int4Weight, group_count, middle_code, packed_columns, super_count
from .names import Scheme

# Limits of one product's error, relative to the norm of the truth. Correct kernels stay far below them.
PRODUCT_LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def judge(ours: Tensor, same: Tensor, truth: Tensor, product: bool = False) -> dict[str, Any]:
    """Holds the error of ``ours`` against that of torch in the same dtype.

    Our error, as maximum and as root mean square, may be twice torch's plus half a rounding (torch's own error may
    happen to be zero).

    Args:
        ours: the result to judge, of any shape.
        same: torch's result, in the dtype of ``ours``.
        truth: the exact result, in float64.
        product: ``ours`` is one matrix product, whose error also has a limit of its own, ``PRODUCT_LIMITS``.

    Returns:
        "ok"; "reason" where it is false; "max", "rms", "torch_max", "torch_rms" and "relative", the error's norm as a
        part of the truth's (None for what is not finite); "share", the error as a part of what is allowed, the largest
        of all; "narrow": no more than torch's error plus one rounding.
    """
    assert truth.dtype == torch.float64
    if ours.shape != truth.shape or ours.dtype != same.dtype:
        result, wanted = f"{tuple(ours.shape)} {ours.dtype}", f"{tuple(truth.shape)} {same.dtype}"
        return {"ok": False, "reason": f"result is {result}, wanted {wanted}"}
    if truth.numel() == 0:
        return {"ok": True, "narrow": True, "share": 0.0}
    if not bool(same.isfinite().all()):
        return {"ok": False, "reason": "torch's own result is not finite and allows any error: take smaller operands"}
    error, torch_error = ours.double() - truth, same.double() - truth
    eps = torch.finfo(ours.dtype).eps
    reasons = [] if bool(ours.isfinite().all()) else ["not finite"]
    row: dict[str, Any] = {"narrow": not reasons}
    shares = []
    for name, measure in (("max", _largest), ("rms", _rms)):
        own, torchs, size = measure(error), measure(torch_error), measure(truth)
        row |= {name: own, f"torch_{name}": torchs}
        row["narrow"] = row["narrow"] and own <= torchs + eps * size
        limit = 2 * torchs + eps / 2 * size
        shares.append(_share(own, limit))
        if not own <= limit:
            reasons.append(f"{name} error {own:.3g}, allowed {limit:.3g}")
    row["relative"] = float(error.norm() / truth.norm())
    if product:
        shares.append(_share(float(error.norm()), PRODUCT_LIMITS[ours.dtype] * float(truth.norm())))
    row["share"] = max(shares)
    if product and not error.norm() <= PRODUCT_LIMITS[ours.dtype] * truth.norm():
        reasons.append(f"relative error {row['relative']:.3g}, allowed {PRODUCT_LIMITS[ours.dtype]:.3g}")
    # JSON cannot hold NaN or infinity.
    row = {key: value if abs(value) < float("inf") else None for key, value in row.items()}
    return {"ok": not reasons} | ({"reason": reasons[0]} if reasons else {}) | row


def _share(error: float, limit: float) -> float:
    """``error / limit``; infinite for NaN, and for an error where none is allowed."""
    return error / limit if limit > 0 and error == error else 0.0 if error == 0 else math.inf


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def sequential_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, whose sums take one term after another, as those of a compiled kernel do.

    Each term is multiplied and added with one rounding. Torch's float32 products on a CPU add in many partial sums,
    whose error is two to five times smaller; a kernel is held against sums of its own kind.
    """
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for column, row in zip(left.double().t(), right.double(), strict=True):
        total = (total + column[:, None] * row).float()
    return total


def normal(*shape: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Random normal numbers, drawn in float32 and rounded to ``dtype``."""
    return torch.randn(shape, device=device, dtype=torch.float32, generator=generator).to(dtype)


def random_weight(
    n: int,
    k: int,
    device: torch.device,
    scheme: Scheme = "symmetric",
    group_size: int = 64,
    scale_dtype: torch.dtype = torch.float16,
    generator: torch.Generator | None = None,
    bits: int = 4,
) -> Int4Weight:
    """A random ``W[n, k]``, drawn in packed form: scales of both signs, decoded entries of a real weight's size.

    The padding of K is random as well, since no operation may read it. ``scale_dtype`` int8 gives scales of two levels.
    """
    groups = group_count(k, group_size)

    def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return normal(*shape, dtype=dtype, device=device, generator=generator)

    def scales(size: float) -> tuple[Tensor, Tensor | None]:
        if scale_dtype != torch.int8:
            return numbers(groups, n, dtype=scale_dtype).mul_(size), None
        drawn = torch.randint(-128, 128, (groups, n), dtype=torch.int8, device=device, generator=generator)
        return drawn, numbers(super_count(k), n).mul_(size / 64)

    packed = torch.randint(0, 256, (n, packed_columns(k, bits)), dtype=torch.uint8, device=device, generator=generator)
    own, super_scales = scales(0.16 / middle_code(bits))
    minimum, super_minimum = scales(0.1) if scheme == "affine" else (None, None)
    codebook = numbers(16, dtype=torch.float32).sort().values if scheme == "codebook" else None
    return Int4Weight(packed, own, k, group_size, minimum, codebook, super_scales, super_minimum)
