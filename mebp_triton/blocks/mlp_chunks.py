"""MLPs by chunks of tokens: tensors as wide as an MLP exist for one chunk at a time, forward and backward.

A chunked MLP is one autograd function inside its block's recompute. It keeps its input; its backward pass recomputes
and differentiates chunk by chunk, and adds up the chunks' gradients in float32 or wider. The result differs from that
of the whole MLP only by the order of summation.

Which modules of a model are such MLPs is found in ``models.discover``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mebp_triton.kernels.panel import spans
from mebp_triton.system.random_state import RandomState

from .recompute import Recompute
from .replay import ForwardState, OpaqueModule, Recording, Replay


class ChunkedMLP(OpaqueModule):
    """A class put before an MLP's own: its forward runs the MLP by chunks.

    Attributes:
        tokens: the most tokens of a chunk, counted over all rows of a batch.
        inner: how a chunk is run and recomputed.
    """

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
        """The MLP's own forward."""
        own = super().forward
        return self.inner.call(lambda: own(*args, **kwargs))

    def spans(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """The first token of each chunk of ``x``, and the one after its last."""
        return spans(x.numel() // x.shape[-1], self.tokens)

    def value(self, x: Tensor, parts: Sequence[Recording | None]) -> Tensor:
        """The output without a graph: as the block's recompute finds it on its tape, or else computed.

        ``parts``: where the outputs inside each chunk are recorded, or were.
        """
        tape = self.tape
        known = None if tape is None else tape.lookup(self, x)
        before = RandomState(x.device) if self.may_draw() and isinstance(tape, Recording) else None
        y = self._computed(x, parts) if known is None else known
        # An MLP that draws random numbers must run in the block's recompute, or what follows it would draw others.
        if tape is not None and (before is None or not before.changed()):
            tape.record(self, y)
        return y

    def may_draw(self) -> bool:
        """Whether its forward pass may draw random numbers."""
        return self.training and self.draws

    @torch.no_grad()
    def _computed(self, x: Tensor, parts: Sequence[Recording | None]) -> Tensor:
        tokens, y = rows(x), None
        for (start, stop), part in zip(self.spans(x), parts, strict=True):
            with self._taped(part):
                piece = self.whole(tokens[:, start:stop])
            if y is None:
                y = piece.new_empty(x.shape)
            rows(y)[:, start:stop] = piece
        assert y is not None
        return y

    def _taped(self, part: Recording | None) -> AbstractContextManager[None]:
        if part is None:
            return nullcontext()
        return self.inner.recorded(part) if isinstance(self.tape, Recording) else self.inner.taped(Replay(part, None))


class _ChunkedFunction(torch.autograd.Function):
    """All chunks of one call. ``tensors`` are the parameters once more, so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        mlp: ChunkedMLP,
        parts: list[Recording | None],
        parameters: list[nn.Parameter],
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.mlp, ctx.parts, ctx.parameters = mlp, parts, parameters
        ctx.state = ForwardState(x.device, random=mlp.may_draw())
        return mlp.value(x, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mlp: ChunkedMLP = ctx.mlp
        x = ctx.saved_tensors[0]
        tokens, grads = rows(x.detach()), rows(dy)
        need_x, *need = ctx.needs_input_grad[3:]
        wanted = [parameter for parameter, needed in zip(ctx.parameters, need, strict=True) if needed]
        # Gradients of float32 leaves are not rounded before they are added up. And hooks on the parameters do not run
        # for the leaves: autograd runs them once, when it gets the sums.
        leaves = [p.detach().to(torch.promote_types(p.dtype, torch.float32)).requires_grad_(True) for p in wanted]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        totals: list[Tensor | None] = [None] * len(wanted)

        def run() -> None:
            for (start, stop), part in zip(mlp.spans(x), ctx.parts, strict=True):
                piece = tokens[:, start:stop].detach().requires_grad_(need_x)
                y = _recomputed(mlp, piece, part)
                sources = [piece, *leaves] if need_x else leaves
                gradients = list(torch.autograd.grad(y, sources, grads[:, start:stop], allow_unused=True))
                if dx is not None:
                    rows(dx)[:, start:stop] = gradients.pop(0)
                totals[:] = [_sum(total, more) for total, more in zip(totals, gradients, strict=True)]

        with ctx.state.replayed(), torch.enable_grad():
            _with_parameters(mlp, wanted, leaves, run)
        given = iter(g if g is None else g.to(p.dtype) for g, p in zip(totals, wanted, strict=True))
        return (None, None, None, dx, *(next(given) if needed else None for needed in need))


def rows(x: Tensor) -> Tensor:
    """``[..., H]`` as ``[1, tokens, H]``."""
    return x.reshape(1, -1, x.shape[-1])


def _recomputed(mlp: ChunkedMLP, piece: Tensor, part: Recording | None) -> Tensor:
    """The next chunk's output with a graph; its value may be NaN.

    Chunk after chunk draws on from the random numbers of the one before, as in the forward pass.
    """
    random = RandomState(piece.device) if mlp.may_draw() else None

    def recompute() -> Tensor:
        if random is not None:
            random.put_back()  # the second call, if there is one, draws the same
        return mlp.whole(piece)  # type: ignore[no-any-return]

    return mlp.inner.run(recompute, part)  # type: ignore[no-any-return]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


class _Around(nn.Module):
    """Lets ``functional_call`` replace the parameters of ``mlp`` while any function runs.

    Called with the MLP itself, it would run the hooks on the MLP and its chunked forward, and end before the backward
    pass of the chunk.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, run: Callable[[], None]) -> None:
        run()


def _with_parameters(
    mlp: nn.Module, parameters: list[nn.Parameter], leaves: list[Tensor], run: Callable[[], None]
) -> None:
    """Calls ``run`` while ``leaves`` are in the places of ``parameters`` in ``mlp``."""
    leaf_of = {id(parameter): leaf for parameter, leaf in zip(parameters, leaves, strict=True)}
    named = {f"mlp.{name}": leaf_of[id(own)] for name, own in mlp.named_parameters() if id(own) in leaf_of}
    functional_call(_Around(mlp), named, (run,))


def chunk_mlp(module: nn.Module, tokens: int) -> None:
    """Turns ``module``, whose forward maps ``[..., H]`` to ``[..., H]``, into one that runs by chunks, in place."""
    kind = type(module)
    module.__class__ = type(f"Chunked{kind.__name__}", (ChunkedMLP, kind), {})
    assert isinstance(module, ChunkedMLP)
    module.tokens, module.inner = tokens, Recompute(module)
