"""One call of one block, from its forward pass to its backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mebp_triton.store.block_inputs import BlockInput, BlockInputStore
from mebp_triton.store.pages import Pages

from .call import Arguments, Call
from .leaks import check_modules, check_objects
from .recompute import Recompute
from .replay import ForwardState, Recording
from .runner import Counters, Event, Treatment


class Host(Protocol):
    """What a call of a block needs of the engine that runs the blocks."""

    blocks: list[nn.Module]
    pages: Sequence[Pages]
    checkpoints: BlockInputStore
    keep_outputs: bool
    recomputes: list[Recompute]
    unchecked: set[int]
    counters: Counters
    observer: Callable[[Event, int], None]

    def trainable(self, index: int) -> list[nn.Parameter]: ...

    def run_forward(self, index: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...

    def call(self, index: int, run: Callable[[], Any]) -> Any: ...

    def prefetch_below(self, index: int) -> None: ...


class BlockRun:
    """One call of one block, from its forward to its backward."""

    def __init__(
        self,
        engine: Host,
        index: int,
        original: Callable[..., Any],
        arguments: Arguments,
        live: Call,
        moving: list[int],
        hidden: int,
        treatment: Treatment,
        parameters: list[nn.Parameter],
    ) -> None:
        self.engine, self.index, self.original, self.treatment = engine, index, original, treatment
        self.arguments, self.moving, self.hidden = arguments, moving, hidden
        self.live: Call | None = live
        self.leaves = leaves = arguments.leaves
        self.parameters = parameters
        # A block that only passes the gradient on is recomputed with its parameters too.
        # The hidden state is its checkpoint's to watch.
        held = [leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and place != hidden]
        self.watched = [*engine.trainable(index), *held] if treatment != "identity" else []
        self.versions = [tensor._version for tensor in self.watched]
        self.training = engine.blocks[index].training
        self.surroundings = ForwardState(leaves[hidden].device, random=self.training)
        self.checkpoint: BlockInput | None = None
        self.recording: Recording | None = None
        self.output_spec: Any = None
        self.output_leaves: list[Any] = []

    def forward(self) -> tuple[Tensor, ...]:
        """Runs the block without a graph; afterwards only the checkpoint holds its input."""
        assert self.live is not None
        keeping: AbstractContextManager[object] = nullcontext()
        if self.treatment != "identity":
            self.checkpoint = self.engine.checkpoints.save(self.leaves[self.hidden])
            self.engine.counters.checkpoint += 1
            if self.engine.keep_outputs:
                self.recording = Recording(self.engine.checkpoints)
                keeping = self.engine.recomputes[self.index].recorded(self.recording)
        with keeping:
            output = self.engine.run_forward(self.index, self.original, self.live.args, self.live.kwargs)
        self.leaves[self.hidden] = None
        if self.treatment == "identity":
            self.leaves.clear()
        self.output_leaves, self.output_spec = tree_flatten((output, self.live.written()))
        tensors = tuple(leaf for leaf in self.output_leaves if isinstance(leaf, Tensor))
        self.output_leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in self.output_leaves]
        return tensors

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Any:
        """The block's output with the function's tensors in it; they are put into its containers as well."""
        assert self.live is not None
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.output_leaves]
        output, written = tree_unflatten(leaves, self.output_spec)
        self.live.write(written)
        self.live, self.arguments.containers = None, []
        return output

    def backward(self, grads: tuple[Tensor | None, ...], needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the moving inputs and the parameters, by recomputing the block."""
        changed = [p._version for p in self.watched] != self.versions
        if changed:
            raise RuntimeError(f"a parameter or an input of block {self.index} changed between forward and backward")
        if self.engine.blocks[self.index].training != self.training:
            raise RuntimeError(f"block {self.index} went from train() to eval(), or back, between forward and backward")
        assert self.checkpoint is not None
        leaves = list(self.leaves)
        leaves[self.hidden] = self.checkpoint.load()
        for place, need in zip(self.moving, needed, strict=False):
            leaves[place] = leaves[place].detach().requires_grad_(need)
        inputs = [leaves[place] for place in self.moving] + self.parameters
        wanted = [item for item, need in zip(inputs, needed, strict=True) if need]
        with self.engine.pages[self.index]:
            self.engine.prefetch_below(self.index if any(needed[: len(self.moving)]) else 0)
            found = self._gradients(leaves, wanted, grads)
        self.engine.counters.recompute += 1
        self.engine.observer("backward", self.index)
        given = iter(found)
        return [next(given) if need else None for need in needed]

    def _gradients(
        self, leaves: list[Any], wanted: list[Tensor], grads: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), _only_trainable(self), _without_hooks(self.parameters):
            outputs = self.engine.recomputes[self.index].run(lambda: self._recompute(leaves), self.recording)
            if self.index in self.engine.unchecked:
                self.engine.unchecked.remove(self.index)
                check_modules(self.index, self.engine.blocks)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            return torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)

    def _recompute(self, leaves: list[Any]) -> list[Tensor]:
        call = self.arguments.call(leaves)
        with self.surroundings.replayed():
            output = self.engine.call(self.index, functools.partial(self.original, *call.args, **call.kwargs))
        outputs = [leaf for leaf in tree_flatten((output, call.written()))[0] if isinstance(leaf, Tensor)]
        check_objects(self.index, self.arguments.objects(call), outputs)
        return outputs


_TENSOR = object()


@contextmanager
def _only_trainable(run: BlockRun) -> Iterator[None]:
    """Within, the parameters of a block that passes the gradient on but is not trained require none."""
    frozen = run.engine.trainable(run.index) if run.treatment == "exact" else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def _without_hooks(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, hooks on the parameters rest: they run when autograd gets the gradients that are found here."""
    hooks = [(found, dict(found)) for parameter in parameters if (found := parameter._backward_hooks)]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)


class BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: BlockRun, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        outputs = run.forward()
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: BlockRun = ctx.run
        needed = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None, *[None] * len(needed))
        if run.treatment == "identity":
            run.engine.counters.identity += 1
            return (None, *(grads[0] if place == run.hidden else None for place in run.moving))
        return (None, *run.backward(grads, needed))
