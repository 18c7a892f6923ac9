"""The forward pass of a model block by block: all windows go through a block before the next one's weights are read.

The model's own code runs for every window and block, but the blocks before the one in question hand on what they gave,
and nothing behind it is run. So a block gets its arguments as it would in one pass, whatever they are: masks and
positions of its kind of layer, tensors that blocks hand on beside the hidden state, keys and values that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mebp_triton.blocks.call import Arguments, Call
from mebp_triton.blocks.runner import BlockRunner
from mebp_triton.store.block_inputs import BlockInput, BlockInputStore

Batch = dict[str, Tensor]


class _Reached(Exception):
    """Ends a forward pass behind the block that it was for."""


class BlockStream:
    """Sends windows through a model, a block at a time.

    Args:
        model: a transformers model in eval mode. The weights outside of its blocks are in place; those of a block must
            be while it runs.
        stack: its blocks.
        batches: the arguments of the model for each window.
        waiting: where the blocks' outputs wait. It must copy: a model may change them in place.

    Attributes:
        next: the index of the block whose inputs are there.
    """

    def __init__(self, model: Any, stack: nn.ModuleList, batches: Sequence[Batch], waiting: BlockInputStore) -> None:
        self.model, self.batches, self.waiting = model, batches, waiting
        self.next = 0
        self._outputs: list[Any] = [None] * len(batches)  # of the block before the next one, by window
        self._written: list[dict[int, Any]] = [{} for _ in batches]  # what blocks wrote for later ones, by window
        self._window, self._keep, self._given = 0, False, None
        self.runner = BlockRunner(stack, self._run)

    def pass_through(self) -> None:
        """Runs the next block on all windows, for what hooks see."""
        self._all(keep=False)

    def advance(self) -> None:
        """Runs the next block on all windows, and keeps what it gives as the inputs of the one behind it."""
        self._all(keep=True)
        self.next += 1

    def output(self, window: int, **more: Any) -> Any:
        """What the whole model returns for a window, given ``more`` arguments, once all blocks have run."""
        assert self.next == len(self.runner.blocks)
        return self._forward(window, **more)

    def _all(self, keep: bool) -> None:
        self._keep = keep
        before = self._versions()
        for window in range(len(self.batches)):
            try:
                self._forward(window)
            except _Reached:
                continue
            raise ValueError(f"{type(self.model).__name__} does not run its block {self.next}: it cannot be followed")
        if self._versions() != before:  # RWKV divides those of its upper blocks
            raise ValueError(f"{type(self.model).__name__} changes its weights while it runs: it cannot be followed")

    def _versions(self) -> list[int]:
        """How often each parameter of a block was changed in place, also those that are not there yet."""
        return [parameter._version for block in self.runner.blocks for parameter in block.parameters()]

    @torch.no_grad()
    def _forward(self, window: int, **more: Any) -> Any:
        self._window = window
        self._given = _loaded(self._outputs[window])
        try:
            return self.model(**self.batches[window], use_cache=False, **more)
        finally:
            self._given = None

    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs, Arguments(args, kwargs).containers)
        if index < self.next:
            if index in self._written[self._window]:
                call.write(_loaded(self._written[self._window][index]))
            return self._given
        output = original(*args, **kwargs)
        if self._keep:
            self._outputs[self._window] = self._kept(output)
            if any(written := call.written()):
                self._written[self._window][index] = self._kept(written)
        raise _Reached

    def _kept(self, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: _Kept(self.waiting.save(tensor)), tree)


@dataclass(frozen=True)
class _Kept:
    """A tensor that waits, as a leaf."""

    tensor: BlockInput


def _loaded(tree: Any) -> Any:
    return tree_map_only(_Kept, lambda kept: kept.tensor.load(), tree)
