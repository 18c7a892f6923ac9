"""The one rule of correctness: how far a result may be from float64 on the decoded codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Int4Weight
from .names import Scheme


def judge(ours: Tensor, same: Tensor, truth: Tensor) -> dict[str, Any]:
    """Errors of ``ours`` and of torch's ``same``, both against ``truth`` in float64; and whether ours is allowed.

    Returns:
        max, rms, torch_max, torch_rms, relative (to the norm), ok; narrow: no more than torch's own, and a rounding.
    """
    assert truth.dtype == torch.float64
    if ours.shape != truth.shape:
        return {"ok": False, "reason": f"shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"}
    if truth.numel() == 0:
        return {"ok": True, "narrow": True}
    finite = bool(ours.isfinite().all())
    row: dict[str, Any] = {"ok": finite, "narrow": finite}
    eps = torch.finfo(ours.dtype).eps
    measures: dict[str, Callable[[Tensor], float]] = {"max": _largest, "rms": _rms}
    for name, measure in measures.items():
        found, theirs = measure(ours.double() - truth), measure(same.double() - truth)
        row |= {name: found, f"torch_{name}": theirs}
        # torch's own error may happen to be none.
        row["ok"] = row["ok"] and found <= 2 * theirs + eps / 2 * measure(truth)
        row["narrow"] = row["narrow"] and found <= theirs + eps * measure(truth)
    row["relative"] = float((ours.double() - truth).norm() / truth.norm())
    # JSON has no word for a number that is none.
    return {key: value if value == value else None for key, value in row.items()}


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def random_weight(
    n: int, k: int, device: torch.device, scheme: Scheme = "symmetric", group_size: int = 64
) -> Int4Weight:
    """Random codes; scales of both signs; decoded entries of a real weight's size."""
    groups = -(-k // group_size)
    scales = (0.02 * torch.randn(groups, n, device=device)).half()
    return Int4Weight.from_codes(
        torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device),
        scales,
        group_size,
        minimum=(0.1 * torch.randn(groups, n, device=device)).half() if scheme == "affine" else None,
        codebook=torch.randn(16, device=device).sort().values if scheme == "codebook" else None,
    )
