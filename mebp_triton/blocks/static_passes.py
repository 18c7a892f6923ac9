"""The forward pass of a block, and its recompute with its backward pass, as functions from static buffers to others.

Such a function takes no argument and returns nothing, so that it can be captured: it reads the buffers of the block's
arguments, of the gradients of its outputs and of its parameters, and writes its results into buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .call import PLAIN, Arguments
from .static_block import CannotBeStatic, StaticBlock
from .static_buffers import StaticBuffer, StaticBuffers, has_buffer, layout_of


def leaf_keys(leaves: Sequence[Any]) -> Hashable:
    """The layouts of tensors and the values of all else among the leaves of a block's arguments.

    Raises:
        CannotBeStatic: a leaf is neither a tensor that a buffer can hold nor a plain value.
    """
    keys: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and has_buffer(leaf):
            keys.append(layout_of(leaf))
        elif isinstance(leaf, PLAIN):
            keys.append((type(leaf), leaf))
        else:
            raise CannotBeStatic(f"an argument is a {type(leaf).__name__}")
    return tuple(keys)


class StaticPass:
    """A pass of a block over static buffers: ``fill``, call it, then ``results``.

    Args:
        block: the block.
        buffers: where new buffers come from.
        arguments: a call of the block; only its structure is kept.
        leaves: the leaves of that call.
        autocast: the arguments of ``torch.autocast`` that hold in the block's forward pass.
        places: the places of the leaves whose gradients are wanted.
        slots: the places of the parameters whose gradients are wanted, among those of the block.
        grads: the gradients of the outputs; None where an output has none.

    Attributes:
        inputs: the buffers of the tensors among the leaves.
    """

    def __init__(
        self,
        block: StaticBlock,
        buffers: StaticBuffers,
        arguments: Arguments,
        leaves: Sequence[Any],
        autocast: dict[str, Any],
        *,
        places: Sequence[int] = (),
        slots: Sequence[int] = (),
        grads: Sequence[Tensor | None] = (),
    ) -> None:
        self.block, self.buffers = block, buffers
        self.places, self.slots = tuple(places), tuple(slots)
        self.structure = arguments.structure()
        self.inputs = {
            place: buffers.get(("argument", place), leaf)
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
        }
        self.grads = [
            None if grad is None else buffers.get(("gradient", place), grad) for place, grad in enumerate(grads)
        ]
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # Autocast's cache would outlive the graph that fills it.
        self.autocast = autocast | {"cache_enabled": False}
        self.outputs: list[StaticBuffer] = []

    def fill(self, leaves: Sequence[Any], hidden: int, state: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> None:
        """Copies everything in that this pass reads.

        A leaf that a buffer holds already is left out: a mask is the same for all blocks. Not so the block's input and
        its parameters, which may have been written to by ways that leave no trace.

        Args:
            leaves: the leaves of the arguments.
            hidden: the place of the block's input among them.
            state: the block's parameters and buffers.
            grads: the gradients of the outputs that have one.
        """
        pairs = [
            (buffer, leaves[place])
            for place, buffer in self.inputs.items()
            if place == hidden or not buffer.holds(leaves[place])
        ]
        pairs += zip((buffer for buffer in self.grads if buffer is not None), grads, strict=True)
        self.buffers.fill([*pairs, *zip(self.block.slots, state, strict=True)])

    def static_leaves(self) -> list[Any]:
        """The leaves of the arguments, over static buffers."""
        return [
            self.inputs[place].tensor.detach() if place in self.inputs else other
            for place, other in enumerate(self.others)
        ]

    def called(self, leaves: Sequence[Any]) -> Any:
        """The block's output for ``leaves``."""
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        with torch.autocast(**self.autocast):
            return self.block.recompute.call(functools.partial(self.block.module.forward, *args, **kwargs))

    def __call__(self) -> None:
        with self.block.adapters:
            results = self.computed()
        if [layout_of(buffer.tensor) for buffer in self.outputs] != [layout_of(result) for result in results]:
            self.outputs = [self.buffers.get((type(self), place), result) for place, result in enumerate(results)]
        self.buffers.copy([buffer.tensor for buffer in self.outputs], results)

    def computed(self) -> list[Tensor]:
        """The tensors that are the results."""
        raise NotImplementedError

    def results(self) -> Any:
        """The results of the last call, in memory of their own."""
        raise NotImplementedError


class StaticForward(StaticPass):
    """A forward pass without a graph; its result is the block's output."""

    def computed(self) -> list[Tensor]:
        with torch.no_grad():
            self.output_leaves, self.output_spec = tree_flatten(self.called(self.static_leaves()))
        for leaf in self.output_leaves:
            if not (isinstance(leaf, PLAIN) or isinstance(leaf, Tensor) and has_buffer(leaf)):
                raise CannotBeStatic(f"it returns a {type(leaf).__name__}")
        tensors = [leaf.detach() for leaf in self.output_leaves if isinstance(leaf, Tensor)]
        self.output_leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in self.output_leaves]
        return tensors

    def results(self) -> Any:
        given = iter(self.buffers.copies(self.outputs))
        return tree_unflatten(
            [next(given) if leaf is _TENSOR else leaf for leaf in self.output_leaves], self.output_spec
        )


_TENSOR = object()  # marks the place of a tensor among the leaves of an output


class StaticBackward(StaticPass):
    """A recompute and its backward pass; the results are the gradients, None where there is none."""

    def computed(self) -> list[Tensor]:
        leaves = self.static_leaves()
        for place in self.places:
            leaves[place].requires_grad_(True)
        self.block.train_only(set(self.slots))
        wanted = [leaves[place] for place in self.places] + [self.block.tensors[place] for place in self.slots]
        with torch.enable_grad():
            outputs = self.block.recompute.run(lambda: self._outputs(leaves), None)
            pairs = [
                (output, grad.tensor)
                for output, grad in zip(outputs, self.grads, strict=True)
                if grad is not None and output.requires_grad
            ]
            gradients = torch.autograd.grad(
                [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
            )
        self.present = [gradient is not None for gradient in gradients]
        return [gradient for gradient in gradients if gradient is not None]

    def _outputs(self, leaves: list[Any]) -> list[Tensor]:
        return [leaf for leaf in tree_flatten(self.called(leaves))[0] if isinstance(leaf, Tensor)]

    def results(self) -> list[Tensor | None]:
        given = iter(self.buffers.copies(self.outputs))
        return [next(given) if there else None for there in self.present]
