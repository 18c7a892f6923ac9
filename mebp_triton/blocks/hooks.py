"""Selection on any model: hooks on its blocks; the rest is autograd's, and the model's own gradient checkpointing.

The treatments are those of ``backprop``, but nothing is recomputed or paged here. Where the model checkpoints
activations, its recompute may come through the same hooks (if the checkpoint lies around the block) or not (if it lies
within).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from .runner import BlockRunner, hidden_state


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
        self._selections = 0
        self._seen: dict[int, int] = {}  # of which selection a block's last forward pass was

    def trainable(self, index: int) -> list[nn.Parameter]:
        frozen = {id(parameter) for parameter in self._frozen.get(index, [])}
        return [p for p in self.blocks[index].parameters() if p.requires_grad or id(p) in frozen]

    def selected_anew(self) -> None:
        self._selections += 1
        while self._frozen:
            for parameter in self._frozen.popitem()[1]:
                parameter.requires_grad_(True)

    def remove(self) -> None:
        super().remove()
        self.selected_anew()

    def _check_selection(self, index: int, seen: int) -> None:
        if seen != self._selections:
            raise RuntimeError(
                f"the selection changed between the forward and the backward pass of block {index}: advance() after "
                f"the backward pass"
            )

    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1  # within a backward pass: gradient checkpointing
        if again:
            self._check_selection(index, self._seen.get(index, self._selections))
            self.counters.recompute += 1
        else:
            self._seen[index] = self._selections
            self.counters.forward += 1
        output = self._treated(index, again, original, args, kwargs)
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            now = self._selections
            first.register_hook(lambda _: self._check_selection(index, now))
        return output

    def _treated(self, index: int, again: bool, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        treatment, hidden = self.treatment(index), hidden_state(args, kwargs)
        if treatment == "train" or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        moving = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        below = self.is_below(index, moving)
        if not below and treatment == "exact":
            for parameter in self.blocks[index].parameters():
                if parameter.requires_grad:
                    self._frozen.setdefault(index, []).append(parameter)
                    parameter.requires_grad_(False)
            return original(*args, **kwargs)
        if again and self._checkpointed_alone(index):  # only the place in the graph is wanted, nobody reads the output
            return _Pass.apply(hidden, hidden.detach())
        with torch.no_grad():
            output = original(*args, **kwargs)
        if below:  # a leaf again where the input is one: reentrant checkpointing needs that
            return _with_first(output, lambda tensor: tensor.detach().requires_grad_(hidden.requires_grad))
        self.counters.identity += not again
        return _with_first(output, lambda tensor: _Pass.apply(hidden, tensor))

    def _checkpointed_alone(self, index: int) -> bool:
        """Whether the checkpoint around the block is transformers' own, which has this block in it and no other."""
        block = self.blocks[index]
        return isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing and block.training


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
