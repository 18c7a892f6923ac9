"""Selection on any model: hooks on its blocks; the rest is autograd's, and the model's own gradient checkpointing.

The treatments are those of ``backprop``, but nothing is recomputed or paged here. Where the model checkpoints
activations, its recompute comes through the same hooks; a block that is passed by is not computed again then, because
only its place in the graph is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockRunner, hidden_state


class BlockHooks(BlockRunner):
    """Runs the blocks of a model as ``treatment`` says, with the graph that autograd makes.

    Args:
        blocks: the model's blocks, in order.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        # What torch.compile finds within a block it may compile; the choice between blocks is Python's.
        super().__init__(blocks, torch.compiler.disable(self._run, recursive=False))

    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_state(args, kwargs)
        again = torch._C._current_graph_task_id() != -1  # within a backward pass: gradient checkpointing
        below = self.is_below(index, None if again else hidden)
        treatment = self.treatment(index)
        if again and (below or treatment == "identity"):
            return _Pass.apply(hidden, hidden.detach())
        if again:
            self.counters.recompute += 1
        else:
            self.counters.forward += 1
        if treatment == "train" or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        if below:  # a leaf again where the input is one: reentrant checkpointing needs that
            with torch.no_grad():
                output = original(*args, **kwargs)
            return _with_first(output, lambda tensor: tensor.detach().requires_grad_(hidden.requires_grad))
        if treatment == "exact":
            with _frozen(self.trainable(index)):
                return original(*args, **kwargs)
        self.counters.identity += 1
        with torch.no_grad():
            output = original(*args, **kwargs)
        return _with_first(output, lambda tensor: _Pass.apply(hidden, tensor))


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output, with its hidden state (itself, or the first of a tuple) changed."""
    if isinstance(output, Tensor):
        return change(output)
    return type(output)((change(output[0]), *output[1:]))


class _Pass(torch.autograd.Function):
    """The block's output as it is; its gradient is that of the block's input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, the parameters require no gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
