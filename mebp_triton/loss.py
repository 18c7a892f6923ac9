"""The int4 head and the loss over it, in one pass and without logits, under transformers' own modelling code.

A model's forward calls its head, does what it does to the logits (Gemma's soft-capping, Granite's scale), and hands
them to ``loss_function``. While a loss without logits is wanted, the head returns ``DeferredLogits``, which write
down those operations instead of computing them; the loss then applies them tile by tile. Any operation that is not
understood makes the real logits, so the result is exact either way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .kernels.cross_entropy import OnePass
from .kernels.layout import Int4Weight
from .kernels.ops import int4_cross_entropy, int4_matmul, int4_matmul_dx, resolve_backend
from .kernels.reference import decode
from .lora import Int4Table, autocast_input

DECODED_ROWS = 4096  # at a time


class Int4Head(Int4Table, nn.Linear):  # type: ignore[override,misc]
    """A frozen language-model head over an int4 weight ``[V, K]``, possibly the embedding's.

    Attributes:
        deferred: while true, ``forward`` returns ``DeferredLogits`` instead of logits.
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

    def logits(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return int4_matmul(x, self.int4(), self.bias, backend=self.backend)
        return _WalkedLogits.apply(x, self)

    def decoded(self) -> nn.Linear:
        """The same as a plain, frozen linear layer in ``compute_dtype``."""
        weight = torch.empty(self.weight.shape, dtype=self.compute_dtype, device=self.weight.device)
        for first, rows in self.rows.segments() if self.rows is not None else [(0, self.int4())]:
            for start in range(0, rows.out_features, DECODED_ROWS):
                part = decode(rows.rows(start, start + DECODED_ROWS), torch.promote_types(weight.dtype, torch.float32))
                weight[first + start : first + start + part.shape[0]] = part
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, ignore_index: int, factors: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        """``int4_cross_entropy`` over this head: losses and argmax, ``[T]``."""
        if self.rows is None:
            return int4_cross_entropy(hidden, self.int4(), targets, self.bias, ignore_index, factors, self.backend)
        return _WalkedLoss.apply(hidden, self, targets, ignore_index, factors)


class _WalkedLoss(torch.autograd.Function):
    """``int4_cross_entropy`` over a head that comes in segments."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Int4Head, targets: Tensor, ignore_index: int, factors: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        assert head.rows is not None
        by_kernel = resolve_backend(head.backend, hidden.device, hidden.dtype) == "triton"
        with torch.autocast(hidden.device.type, enabled=False):
            one_pass = OnePass(hidden, targets, head.bias, ignore_index, factors, ctx.needs_input_grad[0], by_kernel)
            for first, rows in head.rows.segments():
                one_pass.add(rows, first)
            losses, grad, argmax = one_pass.finish(head.rows.gather(one_pass.targets))
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(argmax)
        return losses, argmax

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * dlosses.unsqueeze(1)).to(ctx.dtype), None, None, None, None


class _WalkedLogits(torch.autograd.Function):
    """All logits of a head that comes in segments."""

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


class DeferredLogits:
    """Logits ``[..., V]`` that are not computed: a hidden state, the head, and what is done to the result.

    ``factors``: multiplied one after the other, with a tanh between two neighbours.
    """

    def __init__(self, hidden: Tensor, head: Int4Head, factors: tuple[float, ...]) -> None:
        self.hidden, self.head, self.factors = hidden, head, factors

    def _times(self, factor: float) -> DeferredLogits:
        return DeferredLogits(self.hidden, self.head, (*self.factors[:-1], self.factors[-1] * factor))

    def materialize(self) -> Tensor:
        """The real logits."""
        logits = self.head.logits(self.hidden) * self.factors[0]
        for factor in self.factors[1:]:
            logits = torch.tanh(logits) * factor
        return logits

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def float(self) -> DeferredLogits:
        return self  # the loss is computed in float32 anyway

    def contiguous(self) -> DeferredLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        return self  # only the dtype or device of what the loss reads and accumulates anyway

    def tanh(self) -> DeferredLogits:
        return DeferredLogits(self.hidden, self.head, (*self.factors, 1.0))

    def __mul__(self, other: Any) -> Any:
        return self._times(float(other)) if isinstance(other, int | float) else _materialized(self, "*") * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._times(1.0 / other) if isinstance(other, int | float) else _materialized(self, "/") / other

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and not kwargs:
            if function is torch.tanh and len(args) == 1:
                return first.tanh()
            if function in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__) and len(args) == 2:
                return first * args[1]
            if function in (torch.div, torch.Tensor.div, torch.Tensor.__truediv__) and len(args) == 2:
                return first / args[1]
        name = getattr(function, "__name__", str(function))
        args, kwargs = tree_map(
            lambda item: _materialized(item, name) if isinstance(item, DeferredLogits) else item, (args, kwargs or {})
        )
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise TypeError(
                f"deferred logits cannot be changed in place by {name}: call the model with return_logits=True"
            )
        return getattr(_materialized(self, name), name)


def _operator(name: str) -> Callable[..., Any]:
    return lambda logits, *others: getattr(_materialized(logits, name), name)(*others)


# Python looks for operators on the type, so ``__getattr__`` does not see them.
for _name in (
    "getitem",
    "add",
    "radd",
    "sub",
    "rsub",
    "rtruediv",
    "matmul",
    "pow",
    "neg",
    "abs",
    "lt",
    "le",
    "gt",
    "ge",
):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


def _materialized(logits: DeferredLogits, operation: str) -> Tensor:
    warnings.warn(
        f"the model applies {operation!r} to its logits, so all of them ({tuple(logits.shape)}) are computed: "
        "the result is the same, the memory is not",
        stacklevel=3,
    )
    return logits.materialize()


class OnDemandLogits(Tensor):
    """Logits ``[..., V]`` in float32 or wider that the first operation on them computes; no warning, and no gradient.

    Until then only the hidden state is kept: a trainer that evaluates the loss alone does not pay for them.
    """

    _deferred: DeferredLogits | None
    _real: Tensor | None

    @staticmethod
    def __new__(cls, deferred: DeferredLogits) -> OnDemandLogits:
        dtype = torch.promote_types(deferred.dtype, torch.float32)
        made = Tensor._make_wrapper_subclass(cls, deferred.shape, dtype=dtype, device=deferred.device)
        made._deferred, made._real = deferred, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(
            lambda item: item.computed() if isinstance(item, OnDemandLogits) else item, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    @torch.no_grad()
    def computed(self) -> Tensor:
        if self._deferred is not None:
            self._real, self._deferred = self._deferred.materialize().to(self.dtype), None
        assert self._real is not None
        return self._real

    # These do not come by way of the dispatcher.
    def numpy(self, *, force: bool = False) -> Any:
        return self.computed().numpy(force=force)

    def tolist(self) -> Any:
        return self.computed().tolist()

    def __array__(self, *args: Any) -> Any:
        return self.computed().__array__(*args)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"OnDemandLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


@dataclass
class LossStatistics:
    """Counts of the last loss: targets, and how many of them were the most likely token."""

    tokens: int = 0
    correct: int = 0


class OnePassLoss:
    """Takes ``model.loss_function``'s place, for deferred and for real logits alike.

    The mean over the valid targets; or their sum over ``num_items_in_batch`` where the caller gives it, or over
    ``normalizer`` where that is set: so micro-batches add up to the mean over all tokens of a step. A batch without one
    valid target has loss 0 and zero gradients.

    Attributes:
        statistics: of the last call.
    """

    def __init__(self) -> None:
        self.statistics = LossStatistics()
        self.normalizer: float | None = None

    def __call__(
        self,
        logits: Any,
        labels: Tensor,
        *args: Any,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        _check_targets(targets, logits.shape[-1], ignore_index)
        if isinstance(logits, DeferredLogits):
            head = logits.head
            hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
            losses, argmax = head.cross_entropy(hidden, targets, ignore_index, logits.factors)
        else:
            real = logits.reshape(-1, logits.shape[-1]).float()
            losses = nn.functional.cross_entropy(real, targets, ignore_index=ignore_index, reduction="none")
            argmax = real.argmax(dim=-1)
        valid = int((targets != ignore_index).sum())
        self.statistics = LossStatistics(valid, int(((argmax == targets) & (targets != ignore_index)).sum()))
        divisor = num_items_in_batch if num_items_in_batch is not None else self.normalizer
        if divisor is None or valid == 0:  # trainers count 0 items where all is masked
            divisor = max(valid, 1)
        return losses.sum() / divisor


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    bad = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(bad.any()):
        raise ValueError(f"label {int(targets[bad][0])} is not a token of the vocabulary 0..{vocabulary - 1}")


def _handed_out(item: Any) -> Any:
    """What the caller gets for deferred logits: with gradients on, nothing."""
    if not isinstance(item, DeferredLogits):
        return item
    return None if torch.is_grad_enabled() else OnDemandLogits(item)


def install_loss(model: Any, head: Int4Head) -> OnePassLoss:
    """Lets ``model(..., labels=...)`` compute its loss in one pass over ``head``.

    ``model(..., labels=..., return_logits=True)`` computes the logits as well, as the model itself would; where
    gradients are off, they are there as ``OnDemandLogits`` without being asked for.
    """
    loss = OnePassLoss()
    model.loss_function = loss

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wanted = kwargs.pop("return_logits", False)
        head.deferred = kwargs.get("labels") is not None and not wanted
        return args, kwargs

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        head.deferred = False
        if isinstance(output, dict) and isinstance(output.get("logits"), DeferredLogits):
            return type(output)(**{key: _handed_out(value) for key, value in output.items()})
        if isinstance(output, tuple):
            return tuple(_handed_out(item) for item in output)
        return output

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)
    return loss
