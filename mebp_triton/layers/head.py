"""The int4 language-model head: in place as a whole, or read segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.kernels.cross_entropy import OnePass
from mebp_triton.kernels.functions import int4_cross_entropy, int4_matmul, int4_matmul_dx
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.routing import resolve_backend

from .deferred_logits import DeferredLogits
from .int4_module import Int4Table, RowSource
from .lora_function import autocast_input


class Int4Head(Int4Table, nn.Linear):  # type: ignore[override,misc]
    """A frozen language-model head over an int4 weight ``[V, K]``, which may be the embedding's.

    Attributes:
        deferred: while True, ``forward`` returns ``DeferredLogits`` instead of logits.
    """

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None, compute_dtype: torch.dtype, backend: str = "auto"
    ) -> None:
        nn.Module.__init__(self)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.deferred = False
        self._init_int4(weight, compute_dtype, backend)

    def forward(self, x: Tensor) -> Any:
        x = autocast_input(x)
        return DeferredLogits(x, self, (1.0,)) if self.deferred else self.logits(x)

    @torch.compiler.disable
    def logits(self, x: Tensor) -> Tensor:
        """The logits ``[..., V]`` of hidden states ``[..., K]``."""
        if self.rows is None:
            return int4_matmul(x, self.int4(), self.bias, backend=self.backend)
        return _SegmentedLogits.apply(x, self)

    def decoded(self, weight: nn.Parameter | None = None) -> nn.Linear:
        """The same head as a plain frozen linear layer in ``compute_dtype``, over ``weight`` where it is given."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.decoded_weight(), requires_grad=False) if weight is None else weight
        linear.bias = self.bias
        return linear

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        ignore_index: int,
        factors: tuple[float, ...],
        most_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses and argmax ``[T]`` of hidden states ``[T, K]``; see ``int4_cross_entropy`` and ``Head``."""
        if self.rows is not None:
            return _SegmentedLoss.apply(hidden, self, targets, ignore_index, factors, most_tokens)
        most, weight = most_tokens or max(1, len(targets)), self.int4()
        parts = [
            int4_cross_entropy(own, weight, labels, self.bias, ignore_index, factors, self.backend)
            for own, labels in zip(hidden.split(most), targets.split(most), strict=True)
        ]
        losses, argmax = zip(*parts, strict=True)
        return (losses[0], argmax[0]) if len(parts) == 1 else (torch.cat(losses), torch.cat(argmax))


class _SegmentedLoss(torch.autograd.Function):
    """``int4_cross_entropy`` over a head that is read segment by segment, each for all chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Int4Head,
        targets: Tensor,
        ignore_index: int,
        factors: tuple[float, ...],
        most_tokens: int | None,
    ) -> tuple[Tensor, Tensor]:
        assert head.rows is not None
        need_grad, most = ctx.needs_input_grad[0], most_tokens or max(1, len(targets))
        by_kernel = resolve_backend(head.backend, hidden.device, hidden.dtype) == "triton"
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = [
                OnePass(own, labels, head.bias, ignore_index, factors, need_grad, by_kernel)
                for own, labels in zip(hidden.split(most), targets.split(most), strict=True)
            ]
            for first, rows in head.rows.segments():
                for chunk in chunks:
                    chunk.add(rows, first)
            losses, grad, argmax = _finished(chunks, head.rows)
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(argmax)
        return losses, argmax

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * dlosses.unsqueeze(1)).to(ctx.dtype), None, None, None, None, None


def _finished(chunks: list[OnePass], rows: RowSource) -> tuple[Tensor, ...]:
    """What ``OnePass.finish`` returns, for the tokens of all ``chunks``, which are used up."""
    count, start = sum(len(chunk.hidden) for chunk in chunks), 0
    wholes: tuple[Tensor, ...] = ()
    while chunks:
        chunk = chunks.pop(0)  # frees what it has added up
        parts = chunk.finish(rows.gather(chunk.targets))
        if len(parts[0]) == count:
            return parts
        wholes = wholes or tuple(part.new_empty((count if len(part) else 0, *part.shape[1:])) for part in parts)
        for whole, part in zip(wholes, parts, strict=True):
            whole[start : start + len(part)] = part
        start += len(parts[0])
    return wholes


class _SegmentedLogits(torch.autograd.Function):
    """All logits of a head that is read segment by segment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Int4Head) -> Tensor:
        assert head.rows is not None
        ctx.head = head
        logits = x.new_empty(*x.shape[:-1], head.out_features)
        for first, rows in head.rows.segments():
            stop = first + rows.out_features
            bias = None if head.bias is None else head.bias[first:stop]
            logits[..., first:stop] = int4_matmul(x, rows, bias, backend=head.backend)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, None]:
        head: Int4Head = ctx.head
        assert head.rows is not None
        wide = torch.promote_types(dlogits.dtype, torch.float32)
        dx = dlogits.new_zeros(*dlogits.shape[:-1], head.in_features, dtype=wide)
        for first, rows in head.rows.segments():
            part = dlogits[..., first : first + rows.out_features]
            dx += int4_matmul_dx(part, rows, backend=head.backend)
        return dx.to(dlogits.dtype), None
