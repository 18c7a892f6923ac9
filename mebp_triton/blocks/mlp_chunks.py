"""MLPs by chunks of tokens: what is as wide as an MLP exists for one chunk at a time, forward and backward.

A chunked MLP is one autograd function within its block's recompute. It keeps its input; its backward pass recomputes
and differentiates chunk by chunk, and adds the chunks' gradients up in float32 or wider. Only the order of summation
differs from the whole MLP.

Which modules are MLPs is found when a model is loaded, from their names and by running the modelling code on the meta
device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.kernels.panel import spans
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.system.random_state import RandomState

from .recompute import Recompute
from .replay import ForwardState, OpaqueModule, Recording, Replay


class ChunkedMLP(OpaqueModule):
    """Mixed into an MLP's class, before it: its forward by chunks of at most ``tokens`` of all rows' tokens."""

    tokens: int
    inner: Recompute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.numel() == 0:
            return self.whole(*args, **kwargs)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        parts = [None if self.tape is None else self.tape.part(self) for _ in self.spans(x)]
        if torch.is_grad_enabled() and (x.requires_grad or parameters):
            return _ChunkedFunction.apply(self, parts, parameters, x, *parameters)
        return self.value(x, parts)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP's own forward; afterwards no layer keeps an output for another."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            for layer in self.modules():
                if isinstance(layer, Int4LoRALinear) and layer.shared_input is not None:
                    layer.shared_input.forget()

    def spans(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """First and last token of each chunk of ``x``."""
        return spans(x.numel() // x.shape[-1], self.tokens)

    def value(self, x: Tensor, parts: Sequence[Recording | None]) -> Tensor:
        """The output, without a graph; as it was kept, or NaN, where the block's recompute needs no more."""
        tape = self.tape
        known = None if tape is None else tape.lookup(self, x)
        before = RandomState(x.device) if self.training and isinstance(tape, Recording) else None
        y = self._computed(x, parts) if known is None else known
        # Were it kept although it draws random numbers, the recompute of the block would draw others after it.
        if tape is not None and (before is None or not before.changed()):
            tape.record(self, y)
        return y

    @torch.no_grad()
    def _computed(self, x: Tensor, parts: Sequence[Recording | None]) -> Tensor:
        tokens, y = rows(x), None
        for (start, stop), part in zip(self.spans(x), parts, strict=True):
            with self._taping(part):
                piece = self.whole(tokens[:, start:stop])
            if y is None:
                y = piece.new_empty(x.shape)
            rows(y)[:, start:stop] = piece
        assert y is not None
        return y

    def _taping(self, part: Recording | None) -> AbstractContextManager[None]:
        if part is None:
            return nullcontext()
        return self.inner.recorded(part) if isinstance(self.tape, Recording) else self.inner.taped(Replay(part, None))


class _ChunkedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mlp: ChunkedMLP,
        parts: list[Recording | None],
        parameters: list[nn.Parameter],
        x: Tensor,
        *same: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *same)
        ctx.mlp, ctx.parts, ctx.parameters = mlp, parts, parameters
        ctx.surroundings = ForwardState(x.device, random=mlp.training)
        return mlp.value(x, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mlp: ChunkedMLP = ctx.mlp
        x = ctx.saved_tensors[0]
        tokens, grads = rows(x.detach()), rows(dy)
        need_x, *need = ctx.needs_input_grad[3:]
        wanted = [parameter for parameter, needed in zip(ctx.parameters, need, strict=True) if needed]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        totals: list[Tensor | None] = [None] * len(wanted)
        with ctx.surroundings.replayed(), torch.enable_grad(), _leaves(mlp, wanted) as leaves:
            for (start, stop), part in zip(mlp.spans(x), ctx.parts, strict=True):
                piece = tokens[:, start:stop].detach().requires_grad_(need_x)
                y = _recomputed(mlp, piece, part)
                inputs = [piece, *leaves] if need_x else leaves
                found = list(torch.autograd.grad(y, inputs, grads[:, start:stop], allow_unused=True))
                if dx is not None:
                    rows(dx)[:, start:stop] = found.pop(0)
                totals = [_sum(total, more) for total, more in zip(totals, found, strict=True)]
        given = iter(g if g is None else g.to(p.dtype) for g, p in zip(totals, wanted, strict=True))
        return (None, None, None, dx, *(next(given) if needed else None for needed in need))


def rows(x: Tensor) -> Tensor:
    """``[..., H]`` as ``[1, tokens, H]``."""
    return x.reshape(1, -1, x.shape[-1])


def _recomputed(mlp: ChunkedMLP, piece: Tensor, part: Recording | None) -> Tensor:
    """The next chunk's output with a graph. Its value may be NaN; random numbers are drawn on from where they are."""
    random = RandomState(piece.device) if mlp.training else None

    def recompute() -> Tensor:
        if random is not None:
            random.put_back()  # it may be called twice
        return mlp.whole(piece)  # type: ignore[no-any-return]

    return mlp.inner.run(recompute, part)  # type: ignore[no-any-return]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


@contextmanager
def _leaves(mlp: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within, leaves of float32 or wider are in the parameters' places.

    So the chunks' gradients are not rounded before they are added up, and hooks on the parameters run once.
    """
    wide = [nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float32))) for p in parameters]
    leaf_of = {id(parameter): leaf for parameter, leaf in zip(parameters, wide, strict=True)}
    places = [
        (module, name, parameter)
        for module in mlp.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in leaf_of
    ]
    for module, name, parameter in places:
        module._parameters[name] = leaf_of[id(parameter)]
    try:
        yield wide
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def chunk_mlp(module: nn.Module, tokens: int) -> None:
    kind = type(module)
    module.__class__ = type(f"Chunked{kind.__name__}", (ChunkedMLP, kind), {})
    assert isinstance(module, ChunkedMLP)
    module.tokens, module.inner = tokens, Recompute(module)
