"""Selection on any model: hooks on its blocks; the rest is autograd's, and the model's own gradient checkpointing.

The treatments are those of ``backprop``, but nothing is recomputed or paged here. Where the model checkpoints
activations, its recompute may come through the same hooks (if the checkpoint lies around the block) or not (if it lies
within); a block that is passed by is computed again in neither case, because only its place in the graph is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockRunner, hidden_state


class BlockHooks(BlockRunner):
    """Runs the blocks of a model as ``treatment`` says, with the graph that autograd makes.

    Parameters of a block that is passed truly but not trained require no gradient from its forward pass on, until the
    next selection: a recompute, wherever it comes from, must not find them otherwise.

    Args:
        blocks: the model's blocks, in order.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        # What torch.compile finds within a block it may compile; the choice between blocks is Python's.
        super().__init__(blocks, torch.compiler.disable(self._run, recursive=False))
        self._frozen: dict[int, list[nn.Parameter]] = {}

    def trainable(self, index: int) -> list[nn.Parameter]:
        frozen = {id(parameter) for parameter in self._frozen.get(index, [])}
        return [p for p in self.blocks[index].parameters() if p.requires_grad or id(p) in frozen]

    def selected_anew(self) -> None:
        while self._frozen:
            for parameter in self._frozen.popitem()[1]:
                parameter.requires_grad_(True)

    def remove(self) -> None:
        super().remove()
        self.selected_anew()

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
            for parameter in self._frozen.setdefault(index, self.trainable(index)):
                parameter.requires_grad_(False)
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
