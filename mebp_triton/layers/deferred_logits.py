"""Logits that are not computed until something needs them.

``DeferredLogits`` record what a model does to its logits, and the loss applies it tile by tile. An operation that
cannot be recorded computes the real logits. ``OnDemandLogits`` are what a model's caller gets when gradients are off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Head(Protocol):
    """A language-model head ``[V, K]`` as deferred logits and the loss see it."""

    out_features: int

    def logits(self, x: Tensor) -> Tensor:
        """The real logits ``[..., V]`` of hidden states ``[..., K]``."""
        ...

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        ignore_index: int,
        factors: tuple[float, ...],
        most_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses and argmax ``[T]`` of hidden states ``[T, K]``.

        Args:
            factors: see ``DeferredLogits``.
            most_tokens: tokens that are multiplied by the head at once; None for all.
        """
        ...


class DeferredLogits:
    """Logits ``[..., V]`` that are not computed: the hidden state, the head, and what is done to their product.

    Args:
        hidden: ``[..., K]``.
        factors: what the logits are multiplied by, one after the other, with a tanh between two neighbours.
            ``(1 / c, c)`` is soft-capping at c.
    """

    def __init__(self, hidden: Tensor, head: Head, factors: tuple[float, ...]) -> None:
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
        return self  # the loss computes in float32 in any case

    def contiguous(self) -> DeferredLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        return self  # the loss chooses the dtype in which it accumulates, and runs where the hidden state is

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


# Python looks operators up on the type, so ``__getattr__`` does not see them.
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
        "the results stay the same, but this takes more memory",
        stacklevel=3,
    )
    return logits.materialize()


class OnDemandLogits(Tensor):
    """Logits ``[..., V]`` in float32 or wider that the first operation on them computes, without a gradient.

    Until then only the hidden state is kept, so a trainer that evaluates nothing but the loss does not pay for them.
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
        """The real logits, computed at the first call."""
        if self._deferred is not None:
            self._real, self._deferred = self._deferred.materialize().to(self.dtype), None
        assert self._real is not None
        return self._real

    # These three do not go through the dispatcher.
    def numpy(self, *, force: bool = False) -> Any:
        return self.computed().numpy(force=force)

    def tolist(self) -> Any:
        return self.computed().tolist()

    def __array__(self, *args: Any) -> Any:
        return self.computed().__array__(*args)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"OnDemandLogits(shape={tuple(self.shape)}, dtype={self.dtype})"
