"""A plain-torch twin of every operation, in any float dtype. In float64 it is what the others are tested against.

It is written to be read. Only tests and exact exports call it, since it holds the whole decoded weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .layout import Int4Weight, middle_code, unpack

NormStyle = Literal["twice", "once", "offset"]
Activation = Literal["silu", "gelu_tanh", "gelu"]


def decode(weight: Int4Weight, dtype: torch.dtype = torch.float64) -> Tensor:
    """The decoded weight ``[N, K]``, computed in float32 or wider and then rounded once to ``dtype``.

    The product of a code and a float16 scale is exact in float32, so every implementation gives the same bits. So is
    that of a code of 4 bits and a scale of two levels.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack(weight.packed, weight.in_features)
    group = torch.arange(weight.in_features, device=weight.device) // weight.group_size
    scales = weight.float_scales(wide).t()[:, group]
    minimum = weight.float_minimum(wide)
    if weight.codebook is not None:
        decoded = weight.codebook.to(wide)[codes.long()] * scales
    elif minimum is not None:
        decoded = codes.to(wide) * scales + minimum.t()[:, group]
    else:
        decoded = (codes.to(wide) - middle_code(weight.bits)) * scales
    return decoded.to(dtype)


def matmul(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, t: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """``Y = X·Wᵀ + bias + t·bᵀ``: x ``[M, K]``, bias ``[N]``, t ``[M, R]`` (scaled ``X·Aᵀ``), b ``[N, R]``."""
    y = x @ decode(weight, x.dtype).t()
    if bias is not None:
        y = y + bias.to(x.dtype)
    if t is not None and b is not None:
        y = y + t.to(x.dtype) @ b.to(x.dtype).t()
    return y


def matmul_dx(dy: Tensor, weight: Int4Weight, g: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """``dX = dY·W + g·a``: dy ``[M, N]``, g ``[M, R]`` (scaled ``dY·B``), a ``[R, K]``."""
    dx = dy @ decode(weight, dy.dtype)
    if g is not None and a is not None:
        dx = dx + g.to(dy.dtype) @ a.to(dy.dtype)
    return dx


def embedding(ids: Tensor, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` (any shape, int64) of the decoded table: ``[*ids.shape, K]``."""
    return decode(weight, dtype)[ids]


def cross_entropy(
    hidden: Tensor,
    weight: Int4Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss over the valid targets, its gradient with respect to ``hidden``, and the argmax of every row.

    hidden ``[T, K]``, targets ``[T]`` int64, bias ``[N]``; returns a scalar, ``[T, K]`` and ``[T]``.
    """
    hidden = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = matmul(hidden, weight, bias)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad, logits.argmax(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle = "twice") -> Tensor:
    """``w · x / sqrt(mean(x²) + eps)``: x ``[..., K]``, weight ``[K]``. ``rms_norm_triton`` describes the styles."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if style == "twice":
        return weight * normalised.to(x.dtype)
    factor = weight.to(wide.dtype)
    return (normalised * (1.0 + factor if style == "offset" else factor)).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embeddings: q ``[B, H, T, D]``, k ``[B, H', T, D]``, cos and sin ``[B or 1, T, R]`` with ``R <= D``.

    Column i of the first R is paired with column i + R / 2; those behind them stay as they are.
    """
    cos, sin, rotary = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :rotary], x[..., rotary:]
        low, high = turned.chunk(2, dim=-1)
        turned = (turned * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)
        return torch.cat((turned, rest), dim=-1)

    return rotate(q), rotate(k)


def gated_activation(gate: Tensor, up: Tensor, kind: Activation = "silu") -> Tensor:
    """``act(gate) · up``: both ``[..., N]``."""
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def fits_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel's RMSNorm is defined here: it has no gradient for the weight."""
    alike = x.dim() > 0 and x.shape[-1:] == weight.shape and x.dtype == weight.dtype
    return alike and not weight.requires_grad


def fits_gate(gate: Tensor, up: Tensor) -> bool:
    """Whether a kernel's gated activation is defined here."""
    return gate.shape == up.shape and gate.dtype == up.dtype and gate.dim() > 0


def fits_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether a kernel's rotation is defined here: it has no gradient for cos and sin."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, tokens, columns = q.shape
    rotary = cos.shape[-1]
    return (
        (k.shape[0], *k.shape[2:]) == (batch, tokens, columns)
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == tokens
        and 0 < rotary <= columns
        and rotary % 2 == 0
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and cos.dtype in (q.dtype, torch.float32)
        and not (cos.requires_grad or sin.requires_grad)
    )
