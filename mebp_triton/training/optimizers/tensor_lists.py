"""What an optimizer does to all parameters at once, in few launches and without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the 2-norm of all gradients together, summed in float32 or wider.

    It does not clip, so that the norm can be checked first: clipping by a norm of NaN makes every gradient NaN.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, dtype=wide)))


def clip(parameters: Sequence[nn.Parameter], limit: float, total: Tensor, norm: float) -> None:
    """Scales the gradients down to a norm of ``limit``, where theirs is larger; a norm of NaN makes them all NaN.

    Args:
        total: the norm, as ``total_norm`` gave it. norm: the same as a number, so that smaller ones cost nothing.
    """
    if not norm <= limit * (1 - 1e-5):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)


def split_like(values: Tensor, groups: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
    """``values`` one by one, as views, in groups of the same lengths as ``groups``."""
    single = iter(values.unbind())
    return [[next(single) for _ in group] for group in groups]


def in_dtype_of(likes: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtypes of ``likes``: themselves where they have it, else copies, made in one launch."""
    pairs = list(zip(tensors, likes, strict=True))
    made = [tensor if tensor.dtype == like.dtype else torch.empty_like(like) for tensor, like in pairs]
    copy_back(tensors, made)
    return made


def copy_back(worked: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies what was worked on into the tensors, where it is not the tensor itself."""
    pairs = [(tensor, work) for tensor, work in zip(tensors, worked, strict=True) if work is not tensor]
    if pairs:
        torch._foreach_copy_([tensor for tensor, _ in pairs], [work for _, work in pairs])
