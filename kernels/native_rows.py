"""The small operations of a block by compiled code: norms, the middle of an MLP and rotary embeddings, in float32.

Each is one pass over its numbers, and one or no parallel region, where plain torch takes some seven of both. The
arithmetic is that of ``reference``, up to the rounding of the last digits; the results do not depend on the number of
threads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from .native import instructions, run_rows
from .reference import Activation, NormStyle, fits_gate, fits_norm, fits_rope
from .workspace import is_traced, is_watched

# As ``job.h`` numbers them.
NORM, NORM_DX, GATE, GATE_BACKWARD, ROTATE = range(5)
KINDS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
SHARE = 1 << 17  # numbers that are worth a thread: some 30 microseconds
_JOB = struct.Struct("5qd4q4q2q4q6q4q")


def _takes(*tensors: Tensor) -> bool:
    """Whether compiled code can compute with these tensors.

    Those of torch.func have no memory of their own, and in forward mode torch's own operations pass tangents on.
    """
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    if not plain or instructions() is None or forward_ad._current_level >= 0:
        return False
    return not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` can compute this; it has no gradient for the weight."""
    return fits_norm(x, weight) and _takes(x, weight)


def takes_gate(gate: Tensor, up: Tensor, kind: Activation) -> bool:
    """Whether ``gated_activation`` can compute this."""
    return fits_gate(gate, up) and kind in KINDS and _takes(gate, up)


def takes_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether ``rope`` can compute this; it has no gradient for cos and sin."""
    return fits_rope(q, k, cos, sin) and _takes(q, k, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle = "twice") -> Tensor:
    """Computes ``w · x / sqrt(mean(x²) + eps)``, differentiable in x.

    Args:
        x: ``[..., K]``, any strides. weight: ``[K]``.
        style: "offset" has the factor ``1 + w``; the other two are one in float32.

    Returns:
        ``[..., K]``, contiguous.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Norm.apply(x, weight, eps, style)  # type: ignore[no-any-return]
    return _norm(x, weight, eps, style)


def gated_activation(gate: Tensor, up: Tensor, kind: Activation = "silu") -> Tensor:
    """Computes ``act(gate) · up``, differentiable in both: ``[..., N]`` each, any strides. The result is contiguous."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gate.apply(gate, up, kind)  # type: ignore[no-any-return]
    return _gate(kind, gate, up)[0]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes ``reference.rope``, differentiable in q and k, in one pass; heads come after tokens in memory."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos, sin)  # type: ignore[no-any-return]
    return _rotate(q, k, cos, sin, False)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.style = eps, style
        return _norm(x, weight, eps, style)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _norm(*ctx.saved_tensors, ctx.eps, ctx.style, dy), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gate(kind, gate, up)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gate(ctx.kind, *ctx.saved_tensors, dy), None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotate(dq, dk, *ctx.saved_tensors, True), None, None


def _rows(x: Tensor) -> Tensor:
    """``x`` as rows ``[M, K]`` with contiguous columns, without a copy where its memory allows that."""
    rows = x.resolve_neg().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _run(
    operation: int,
    rows: int,
    columns: int,
    width: int,
    kind: int,
    ins: list[tuple[Tensor, int]],
    outs: list[Tensor],
    eps: float = 0.0,
    places: list[int] | None = None,
) -> None:
    """Does an operation on ``rows`` of ``columns`` numbers.

    Args:
        width: numbers of a row of the result.
        ins: the operands, and how far apart their rows lie.
        places: of ROTATE what ``RowJob`` has from ``tokens`` on.
    """
    if is_traced(outs[0]) or not rows * width:
        return
    threads = max(1, min(torch.get_num_threads(), rows * width // SHARE))
    missing = [0] * (4 - len(ins))
    numbers = [tensor.data_ptr() for tensor, _ in ins] + missing + [stride for _, stride in ins] + missing
    numbers += [outs[0].data_ptr(), outs[-1].data_ptr()]
    run_rows(_JOB.pack(operation, rows, columns, threads, kind, eps, *numbers, *(places or [0] * 14)))


def _norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle, dy: Tensor | None = None) -> Tensor:
    """The norm of x, or with ``dy`` the gradient of x."""
    return _called(_norm_rows, norm_op, x, weight, eps, style == "offset", dy)


def _gate(kind: Activation, gate: Tensor, up: Tensor, dy: Tensor | None = None) -> list[Tensor]:
    """The product, or with ``dy`` the gradients of gate and up."""
    return _called(_gate_rows, gate_op, gate, up, KINDS[kind], dy)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = _called(_rotate_rows, rotate_op, q, k, cos, sin, inverse)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _called(function: Callable[..., Any], op: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function``, or ``op``, which is the same, where something must see it as one operation."""
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    seen = any(is_watched(tensor) for tensor in tensors) and not any(is_traced(tensor) for tensor in tensors)
    return (op if seen else function)(*arguments)


def _norm_rows(x: Tensor, weight: Tensor, eps: float, offset: bool, dy: Tensor | None) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = x.shape[-1]
    rows = [_rows(one) for one in ((x,) if dy is None else (x, dy))] if y.numel() else []
    ins = [(row, row.stride(0)) for row in rows]
    ins.insert(1, (weight.contiguous(), 0))
    operation = NORM if dy is None else NORM_DX
    _run(operation, y.numel() // max(columns, 1), columns, columns, int(offset), ins, [y], eps)
    return y


def _gate_rows(gate: Tensor, up: Tensor, kind: int, dy: Tensor | None) -> list[Tensor]:
    given = [gate, up] if dy is None else [gate, up, dy]
    outs = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in given[1:]]
    columns = gate.shape[-1]
    ins = [(row, row.stride(0)) for row in map(_rows, given)] if gate.numel() else []
    operation = GATE if dy is None else GATE_BACKWARD
    _run(operation, gate.numel() // max(columns, 1), columns, columns, kind, ins, outs)
    return outs


def _rotate_rows(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> list[Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (x.resolve_neg() for x in (q, k, cos, sin)))
    (batch, heads, tokens, columns), heads_k = q.shape, k.shape[1]
    outs = [torch.empty((batch, tokens, count, columns), dtype=q.dtype, device=q.device) for count in (heads, heads_k)]
    places = [tokens, cos.shape[-1] // 2, heads, heads_k]
    places += [stride for x in (q, k) for stride in x.stride()[:3]]
    places += [stride for x in (cos, sin) for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]
    ins, width = [(x, 0) for x in (q, k, cos, sin)], (heads + heads_k) * columns
    _run(ROTATE, batch * tokens, columns, width, int(inverse), ins, outs, places=places)
    return outs


norm_op: Any = custom_op(
    "mebp_triton::native_norm",
    _norm_rows,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, bool offset, Tensor? dy) -> Tensor",
)
gate_op: Any = custom_op(
    "mebp_triton::native_gate",
    _gate_rows,
    mutates_args=(),
    schema="(Tensor gate, Tensor up, int kind, Tensor? dy) -> Tensor[]",
)
rotate_op: Any = custom_op(
    "mebp_triton::native_rotate",
    _rotate_rows,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> Tensor[]",
)
for _op, _function in ((norm_op, _norm_rows), (gate_op, _gate_rows), (rotate_op, _rotate_rows)):
    _op.register_fake(_function)  # on tensors without data it computes nothing
