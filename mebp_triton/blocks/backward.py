"""One call of one block as an autograd function: a forward pass without a graph, and a backward pass that recomputes.

The forward pass keeps the block's input and nothing else. The backward pass loads that input, runs the block again with
a graph of its own, differentiates it, and returns the gradients as those of the function's inputs. So the graph of one
block exists at a time, and autograd itself adds gradients up and runs hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mebp_triton.store.block_inputs import BlockInput, BlockInputStore

from .call import Arguments, Call
from .graphs import BlockCall, BlockGraphs
from .leaks import check_objects
from .recompute import Recompute
from .replay import ForwardState, Recording
from .runner import Counters, Treatment, trainable_parameters

T = TypeVar("T")


class Host(Protocol):
    """The engine as one call of a block sees it."""

    block_inputs: BlockInputStore
    keep_outputs: bool
    counters: Counters
    graphs: BlockGraphs | None

    def run_forward(self, index: int, forward: Callable[[], T]) -> T:
        """Returns ``forward()``, the forward pass of block ``index``, with the block's weights in place."""
        ...

    def run_backward(self, index: int, backward: Callable[[], T], continues: bool) -> T:
        """Returns ``backward()``, the backward pass of block ``index``, with the block's weights in place.

        ``continues``: whether the backward pass goes on to a lower block.
        """
        ...

    def check_modules(self, index: int) -> None:
        """Checks once what block ``index`` left in its modules. Called right after a recompute."""
        ...


@dataclass(frozen=True)
class Block:
    """A block of the model: its place, its module, how it is recomputed, and the forward of its own."""

    index: int
    module: nn.Module
    recompute: Recompute
    forward: Callable[..., Any]


class BlockRun:
    """One call of one block, from its forward to its backward pass.

    Args:
        arguments: the arguments, flattened.
        live: the call with the original containers, which the forward pass writes to.
        hidden: the place of the hidden state among the leaves of the arguments.
        inputs: the places of those leaves that require a gradient.
        parameters: the parameters that get a gradient.
    """

    def __init__(
        self,
        host: Host,
        block: Block,
        treatment: Treatment,
        arguments: Arguments,
        live: Call,
        hidden: int,
        inputs: list[int],
        parameters: list[nn.Parameter],
    ) -> None:
        self.host, self.block, self.treatment = host, block, treatment
        self.arguments, self.hidden, self.inputs, self.parameters = arguments, hidden, inputs, parameters
        self.live: Call | None = live
        self.leaves = leaves = arguments.leaves
        # The recompute reads these as well, so they must not change before it; the parameters also where they are not
        # trained. Identity reads nothing. The hidden state is watched where it is kept.
        others = [leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and place != hidden]
        trainable = parameters if treatment == "train" else trainable_parameters(block.module)
        self.watched = [*trainable, *others] if treatment != "identity" else []
        self.versions = [tensor._version for tensor in self.watched]
        self.training = block.module.training
        self.state = ForwardState(leaves[hidden].device, random=self.training)
        self.block_input: BlockInput | None = None
        self.recording: Recording | None = None
        self.output_spec: Any = None
        self.output_leaves: list[Any] = []

    def forward(self) -> tuple[Tensor, ...]:
        """Brings the block's weights in and runs it without a graph. Returns the output tensors."""
        if self.treatment != "identity":
            self.keep_input()
            self.host.counters.checkpoint += 1
        return self.host.run_forward(self.block.index, self.compute)

    def keep_input(self) -> None:
        """Hands the block's input to the block input store, which alone has it once ``compute`` is over."""
        self.block_input = self.host.block_inputs.save(self.leaves[self.hidden])

    def compute(self) -> tuple[Tensor, ...]:
        """Runs the block, whose weights are in place, without a graph. Returns the output tensors."""
        assert self.live is not None
        recording: AbstractContextManager[object] = nullcontext()
        if self.treatment != "identity" and self.host.keep_outputs:
            self.recording = Recording(self.host.block_inputs)
            recording = self.block.recompute.recorded(self.recording)
        forward = functools.partial(self.block.forward, *self.live.args, **self.live.kwargs)
        if self.host.graphs is not None and self.recording is None:
            forward = functools.partial(self.host.graphs.forward, self._call(self.leaves), forward)
        with recording:
            output = self.block.recompute.call(forward)
        self.leaves[self.hidden] = None
        if self.treatment == "identity":
            self.leaves.clear()
        self.output_leaves, self.output_spec = tree_flatten((output, self.live.written()))
        tensors = tuple(leaf for leaf in self.output_leaves if isinstance(leaf, Tensor))
        self.output_leaves = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in self.output_leaves]
        return tensors

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Any:
        """Returns the block's output, its tensors replaced by ``tensors``, the outputs of the autograd function.

        They also replace what the forward pass wrote into containers: those tensors have no graph.
        """
        assert self.live is not None
        given = iter(tensors)
        leaves = [next(given) if leaf is TENSOR else leaf for leaf in self.output_leaves]
        output, written = tree_unflatten(leaves, self.output_spec)
        self.live.write(written)
        self.live, self.arguments.containers = None, []
        return output

    def backward(self, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Brings the block's weights in, recomputes the block and differentiates it.

        Args:
            grads: the gradients of the outputs; None where an output has none.
            needed: for each of the inputs, then of the parameters, whether its gradient is wanted.

        Returns:
            The gradients of the inputs, then of the parameters; None where not wanted.

        Raises:
            RuntimeError: something that the recompute reads has changed since the forward pass.
        """
        return self.host.run_backward(
            self.block.index,
            lambda: self.gradients(grads, needed),
            continues=any(needed[: len(self.inputs)]),
        )

    def gradients(self, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Computes the gradients of ``backward``; the block's weights must be in place."""
        self._check_unchanged()
        assert self.block_input is not None
        leaves = list(self.leaves)
        leaves[self.hidden] = self.block_input.load()
        # Detached, the inputs are leaves of the recompute's graph: differentiation stops at the block's own inputs, and
        # autograd continues with what is returned here.
        for place, need in zip(self.inputs, needed, strict=False):
            leaves[place] = leaves[place].detach().requires_grad_(need)
        sources = [leaves[place] for place in self.inputs] + self.parameters
        wanted = [source for source, need in zip(sources, needed, strict=True) if need]
        differentiated = functools.partial(self._differentiated, leaves, wanted, grads)
        if self.host.graphs is None or self.recording is not None:
            given = iter(differentiated())
        else:
            places = [place for place, need in zip(self.inputs, needed, strict=False) if need]
            parameters = [one for one, need in zip(self.parameters, needed[len(self.inputs) :], strict=True) if need]
            given = iter(self.host.graphs.backward(self._call(leaves), places, parameters, grads, differentiated))
        return [next(given) if need else None for need in needed]

    def _call(self, leaves: Sequence[Any]) -> BlockCall:
        """This call for the graphs."""
        block = self.block
        return BlockCall(block.index, block.forward, self.arguments, leaves, self.hidden, self.state.autocast)

    def _check_unchanged(self) -> None:
        index = self.block.index
        if [tensor._version for tensor in self.watched] != self.versions:
            raise RuntimeError(f"a parameter or an input of block {index} changed between forward and backward")
        if self.block.module.training != self.training:
            raise RuntimeError(f"block {index} went from train() to eval(), or back, between forward and backward")

    def _differentiated(
        self, leaves: list[Any], wanted: list[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        # A block that passes the gradient on but is not trained is recomputed with frozen parameters: otherwise the
        # autograd functions inside would compute parameter gradients that nobody wants.
        frozen = trainable_parameters(self.block.module) if self.treatment == "exact" else []
        with torch.enable_grad(), _frozen(frozen), _without_hooks(self.parameters):
            outputs = self.block.recompute.run(lambda: self._recompute(leaves), self.recording)
            self.host.check_modules(self.block.index)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            return torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)

    def _recompute(self, leaves: list[Any]) -> list[Tensor]:
        """The block's output tensors, in the order of those of ``forward``, with a graph."""
        call = self.arguments.call(leaves)
        with self.state.replayed():
            output = self.block.recompute.call(functools.partial(self.block.forward, *call.args, **call.kwargs))
        outputs = [leaf for leaf in tree_flatten((output, call.written()))[0] if isinstance(leaf, Tensor)]
        check_objects(self.block.index, self.arguments.objects(call), outputs)
        return outputs


TENSOR = object()  # marks the place of a tensor among the leaves of an output


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """While active, ``parameters`` require no gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _without_hooks(parameters: list[nn.Parameter]) -> Iterator[None]:
    """While active, hooks on ``parameters`` do not run.

    ``torch.autograd.grad`` would run them here, and autograd runs them again when it gets the gradients from us.
    """
    hooks = [(own, dict(own)) for parameter in parameters if (own := parameter._backward_hooks)]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)


class BlockFunction(torch.autograd.Function):
    """A ``BlockRun`` for autograd. ``tensors`` are the run's inputs, then its parameters."""

    @staticmethod
    def forward(ctx: Any, run: BlockRun, *tensors: Tensor) -> tuple[Tensor, ...]:
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
            run.host.counters.identity += 1
            return (None, *(grads[0] if place == run.hidden else None for place in run.inputs))
        return (None, *run.backward(grads, needed))
