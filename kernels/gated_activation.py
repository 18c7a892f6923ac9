"""``act(gate) · up``, the middle of an MLP (SwiGLU, GeGLU; arXiv 2002.05202), as one kernel, and its backward pass.

Only gate and up are kept for the backward pass, which computes the activation anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLOAT_DTYPES, WEIGHTLESS
from .reference import Activation, fits_gate

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """``act(x)`` and its derivative, in float32. KIND: "silu", "gelu_tanh" or "gelu"."""
    if KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2π)
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / sqrt(2)
        return x * share, share + x * density
    else:
        # GELU by tanh is x · sigmoid(2u), since 1 + tanh(u) = 2 · sigmoid(2u).
        z = x
        slope = tl.full(x.shape, 1.0, tl.float32)
        if KIND == "gelu_tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 · sqrt(2 / π)
            slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)
        grown = 1.0 + tl.exp(-z)
        share = 1.0 / grown
        active = x / grown
        return active, share + active * slope / (1.0 + tl.exp(z))


@triton.jit
def _load_part(gate_ptr, up_ptr, N, stride_gm, stride_um, BLOCK_N: tl.constexpr):
    """The program's part of a row: the row, its columns, which of them there are, and gate and up in float32."""
    blocks_n = (N + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // blocks_n).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    # [BLOCK_N]
    gate = tl.load(gate_ptr + row * stride_gm + offs_n, mask=mask, other=0.0).to(tl.float32)
    # [BLOCK_N]
    up = tl.load(up_ptr + row * stride_um + offs_n, mask=mask, other=0.0).to(tl.float32)
    return row, offs_n, mask, gate, up


@triton.jit
def _gated_activation_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    N,
    stride_gm,
    stride_um,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y = act(gate) · up``, where ``act(gate)`` is rounded as if it were a result of its own.

    gate_ptr, up_ptr: ``[M, N]``. y_ptr: ``[M, N]``, contiguous. A program has a part of a row.
    """
    row, offs_n, mask, gate, up = _load_part(gate_ptr, up_ptr, N, stride_gm, stride_um, BLOCK_N)
    active, _ = _activation(gate, KIND)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + row * N + offs_n, (active.to(dtype).to(tl.float32) * up).to(dtype), mask=mask)


@triton.jit
def _gated_activation_backward_kernel(
    gate_ptr,
    up_ptr,
    dy_ptr,
    dgate_ptr,
    dup_ptr,
    N,
    stride_gm,
    stride_um,
    stride_dym,
    stride_dm,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dgate = dy · up · act'(gate)`` and ``dup = dy · act(gate)``, each rounded once.

    dy_ptr: ``[M, N]``. dgate_ptr, dup_ptr: ``[M, N]``, with one stride. See ``_gated_activation_kernel``.
    """
    row, offs_n, mask, gate, up = _load_part(gate_ptr, up_ptr, N, stride_gm, stride_um, BLOCK_N)
    # [BLOCK_N]
    dy = tl.load(dy_ptr + row * stride_dym + offs_n, mask=mask, other=0.0).to(tl.float32)
    active, slope = _activation(gate, KIND)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * stride_dm + offs_n, (dy * up * slope).to(dtype), mask=mask)
    tl.store(dup_ptr + row * stride_dm + offs_n, (dy * active).to(dtype), mask=mask)


def _rows(*tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """The tensors, of one shape, as M rows of N contiguous columns; M and N.

    If all are contiguous, they are as they were, and a single row.
    """
    if all([tensor.is_contiguous() for tensor in tensors]):
        return list(tensors), 1, tensors[0].numel()
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return [row if row.stride(1) == 1 else row.contiguous() for row in rows], *rows[0].shape


def _launch(kernel: Any, kind: Activation, m: int, operands: dict[str, Any], **rows: Tensor) -> None:
    """Launches a kernel. rows: the tensors of which it has the strides, by the strides' names."""

    def new() -> tuple[dict[str, Any], dict[str, Any]]:
        strides = {name: row.stride(0) for name, row in rows.items()}
        return {**operands, **strides, "KIND": kind, "BLOCK_N": BLOCK}, OPTIONS

    WEIGHTLESS.launch(kernel, (m * -(-operands["N"] // BLOCK),), (kind,), operands, new)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_activation_triton(gate, up, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *gated_activation_backward_triton(dy, gate, up, ctx.kind), None


def takes(gate: Tensor, up: Tensor) -> bool:
    """Whether the kernel can compute this."""
    return fits_gate(gate, up) and gate.dtype in FLOAT_DTYPES


def gated_activation(gate: Tensor, up: Tensor, kind: Activation = "silu") -> Tensor:
    """``gated_activation_triton``, differentiable in both tensors, of which ``takes`` holds."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedActivation.apply(gate, up, kind)  # type: ignore[no-any-return]
    return gated_activation_triton(gate, up, kind)


def gated_activation_triton(gate: Tensor, up: Tensor, kind: Activation = "silu") -> Tensor:
    """Computes ``act(gate) · up`` in float32; the activation is rounded as if it were a result of its own.

    Args:
        gate, up: ``[..., N]`` float32, float16 or bfloat16, any strides.
        kind: "silu", "gelu" (by erf) or "gelu_tanh".

    Returns:
        ``[..., N]`` in gate's dtype, contiguous.
    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        (gates, ups), m, n = _rows(gate, up)
        operands = {"gate_ptr": gates, "up_ptr": ups, "y_ptr": y, "N": n}
        _launch(_gated_activation_kernel, kind, m, operands, stride_gm=gates, stride_um=ups)
    return y


def gated_activation_backward_triton(
    dy: Tensor, gate: Tensor, up: Tensor, kind: Activation = "silu"
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of ``gated_activation_triton`` with respect to gate and up, in one launch.

    Args:
        dy: ``[..., N]`` in gate's dtype, any strides. The others are those of the forward pass.

    Returns:
        ``[..., N]`` each, in gate's dtype, contiguous.
    """
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if dgate.numel():
        (gates, ups, dys), m, n = _rows(gate, up, dy)
        operands = {"gate_ptr": gates, "up_ptr": ups, "dy_ptr": dys, "dgate_ptr": dgate, "dup_ptr": dup}
        operands |= {"N": n, "stride_dm": n}
        strides = {"stride_gm": gates, "stride_um": ups, "stride_dym": dys}
        _launch(_gated_activation_backward_kernel, kind, m, operands, **strides)
    return dgate, dup
