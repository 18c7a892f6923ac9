"""Selection on any model, by replacing the forward of its blocks; autograd and the model's checkpointing do the rest.

The treatments are those of ``engine``, but nothing is recomputed or paged here. Where the model uses gradient
checkpointing, its recompute passes through these forwards again if the checkpoint lies around the block, and does not
if the checkpoint lies inside. Both must see the same treatment as the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from .runner import BlockRunner, hidden_state


class BlockHooks(BlockRunner):
    """Runs the blocks of a model as ``treatment`` says, with the graph that autograd makes.

    A block with treatment "exact" has its parameters frozen from its forward pass until the next selection, and not
    only during the forward pass: a recompute, wherever it comes from, must find them frozen too.

    Args:
        blocks: the model's blocks, in order.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks, self._run)
        self._frozen: dict[int, list[nn.Parameter]] = {}
        self._selections = 0  # how many selections came before the present one
        self._forward_in: dict[int, int] = {}  # in which selection each block had its last forward pass

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model, which has no selection: there these hooks only call the blocks."""
        return super().__getstate__() | {"removed": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.selection_will_change()  # the copy's parameters are trained again, like those of ``remove``

    def trainable(self, index: int) -> list[nn.Parameter]:
        frozen = {id(parameter) for parameter in self._frozen.get(index, [])}
        return [p for p in self.blocks[index].parameters() if p.requires_grad or id(p) in frozen]

    def selection_will_change(self) -> None:
        self._selections += 1
        while self._frozen:
            for parameter in self._frozen.popitem()[1]:
                parameter.requires_grad_(True)

    def remove(self) -> None:
        super().remove()
        self.selection_will_change()

    def _check_selection(self, index: int, forward_in: int) -> None:
        if forward_in != self._selections:
            raise RuntimeError(
                f"the selection changed between the forward and the backward pass of block {index}: advance() after "
                f"the backward pass"
            )

    # The choice between treatments stays in Python; what a block computes inside may still be compiled.
    @functools.partial(torch.compiler.disable, recursive=False)
    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1  # called during a backward pass, so by gradient checkpointing
        if again:
            self._check_selection(index, self._forward_in.get(index, self._selections))
            self.counters.recompute += 1
        else:
            self._forward_in[index] = self._selections
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
        requires_grad = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        below = self.is_below(index, requires_grad)
        if not below and treatment == "exact":
            for parameter in self.blocks[index].parameters():
                if parameter.requires_grad:
                    self._frozen.setdefault(index, []).append(parameter)
                    parameter.requires_grad_(False)
            return original(*args, **kwargs)
        if again and self._is_checkpointed_alone(index):
            # Nothing reads this output: the checkpoint ends with this block. Only its place in the graph is needed.
            return _Identity.apply(hidden, hidden.detach())
        with torch.no_grad():
            output = original(*args, **kwargs)
        if below:
            # A leaf of its own cuts the graph here. It requires a gradient if the input does, since reentrant
            # checkpointing differentiates only what gets such an input.
            return _with_first(output, lambda tensor: tensor.detach().requires_grad_(hidden.requires_grad))
        self.counters.identity += not again
        return _with_first(output, lambda tensor: _Identity.apply(hidden, tensor))

    def _is_checkpointed_alone(self, index: int) -> bool:
        """Whether the checkpoint around the block is transformers' own, which holds this block and no other."""
        block = self.blocks[index]
        return isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing and block.training


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden state changed, which is the output itself or the first of a tuple."""
    if isinstance(output, Tensor):
        return change(output)
    return type(output)((change(output[0]), *output[1:]))


class _Identity(torch.autograd.Function):
    """Returns ``output``, and passes its gradient to ``hidden`` unchanged."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
