"""The rule for numbers, as the kernels' tests have it: twice the error of torch in the same dtype, and half a rounding.

Beside it stands whether the narrower rule holds: no more than torch's own error, and a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def judge(ours: Tensor, same: Tensor, truth: Tensor) -> dict[str, Any]:
    """Errors of ``ours`` and of torch's ``same``, both against ``truth`` in float64; and whether ours is allowed.

    Returns:
        max, rms, torch_max, torch_rms, relative (to the norm), ok, narrow.
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


def close(ours: Tensor, theirs: Tensor, relative: float) -> bool:
    """Two sides compute the same: before they are timed against each other."""
    norm = theirs.double().norm()
    return bool((ours.double() - theirs.double()).norm() <= relative * norm)
