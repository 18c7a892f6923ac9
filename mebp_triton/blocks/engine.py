"""MeBP (arXiv 2510.03425): every block is one autograd function that keeps its input and recomputes the rest.

``BlockEngine`` puts itself in the place of each block's ``forward``. Under ``no_grad`` it only brings the block's
weights in and lets them go. With gradients on, the block runs without a graph, its input goes to the checkpoint
store, and the backward pass brings the weights in again, recomputes, and differentiates. Gradients of trainable
parameters are returned to autograd as those of the function's inputs, so accumulation, hooks and
``torch.autograd.grad`` work as everywhere.

What a block does in a step is the selection's to say (LCSB, arXiv 2602.13073):

========== ===================================== ==============================
treatment  gradient to the block's input         gradients of its parameters
========== ===================================== ==============================
train      true                                  true
exact      true                                  none
identity   ``dX = dY``; nothing read, recomputed none
========== ===================================== ==============================

A block whose input needs no gradient, and that is not trained, has no backward at all. What blocks hand on beside the
hidden state has its gradient in the first two rows, and none in the third; see ``arguments``.

A recompute leaves out the products that it can; see ``recompute``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mebp_triton.layers.linear import ComputedTogether, Int4LoRALinear
from mebp_triton.store.block_inputs import BlockInputStore, DeviceBlockInputs
from mebp_triton.store.pages import Pages
from mebp_triton.store.waiting import Waiting

from .backward import BlockFunction, BlockRun
from .call import Arguments, Call, map_caches
from .recompute import Recompute
from .runner import BlockRunner, hidden_state


class BlockEngine(BlockRunner):
    """Runs the blocks of a model one by one.

    Args:
        blocks: the model's blocks, in order.
        pages: per block, entered while its weights are needed; None where they always lie in place.
        checkpoints: where the blocks' inputs wait.
        keep_outputs: the outputs of a block's adapted layers wait there as well, and its recompute has no products.
        waiting: what those who read files count their time in.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        pages: Sequence[Pages] | None = None,
        checkpoints: BlockInputStore | None = None,
        keep_outputs: bool = False,
        waiting: Waiting | None = None,
    ) -> None:
        super().__init__(blocks, self._run)
        self.pages: Sequence[Pages] = pages if pages is not None else [Pages()] * len(self.blocks)
        self.checkpoints = checkpoints if checkpoints is not None else DeviceBlockInputs()
        self.keep_outputs = keep_outputs
        self.waiting = Waiting() if waiting is None else waiting
        self.recomputes = [Recompute(block) for block in self.blocks]
        self.shared_inputs = [_shared_inputs_in(block) for block in self.blocks]
        self.unchecked = set(range(len(self.blocks)))  # the blocks whose attributes were not looked at yet

    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run_forward(index, original, args, kwargs)
        arguments = Arguments(args, kwargs)
        if any(isinstance(leaf, Cache) for leaf in arguments.leaves) and self._trains_any(arguments.leaves):
            args, kwargs = map_caches(_empty_cache, args, kwargs)
            arguments = Arguments(args, kwargs)
        treatment, leaves = self.treatment(index), arguments.leaves
        hidden = hidden_state(args, kwargs)
        moving = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        parameters = self.trainable(index) if treatment == "train" else []
        if self.is_below(index, bool(moving)) or not moving and not parameters:
            with torch.no_grad():
                return self.run_forward(index, original, args, kwargs)
        place = next(place for place, leaf in enumerate(leaves) if leaf is hidden)
        live = Call(args, kwargs, arguments.containers)
        run = BlockRun(self, index, original, arguments, live, moving, place, treatment, parameters)
        outputs = BlockFunction.apply(run, *(leaves[place] for place in moving), *parameters)
        return run.rebuild(outputs)

    def _trains_any(self, leaves: list[Any]) -> bool:
        """Whether this forward pass makes a graph, here or in another block."""
        return _any_moves(leaves) or any(self.trainable(index) for index in range(len(self.blocks)))

    def run_forward(self, index: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self.pages[index]:
            if index + 1 < len(self.blocks):
                self.pages[index + 1].prefetch()
            output = self.call(index, functools.partial(original, *args, **kwargs))
        self.counters.forward += 1
        self.observer("forward", index)
        return output

    def prefetch_below(self, index: int) -> None:
        """The block whose backward pass comes after that of ``index``; after the last one's, the next step's first."""
        below = (lower for lower in reversed(range(index)) if self.treatment(lower) != "identity")
        self.pages[next(below, 0)].prefetch()

    def call(self, index: int, run: Callable[[], Any]) -> Any:
        """Runs a block's own forward; afterwards no layer keeps an output for another."""
        try:
            return run()
        finally:
            for shared in self.shared_inputs[index]:
                shared.forget()


def _shared_inputs_in(block: nn.Module) -> set[ComputedTogether]:
    layers = [module for module in block.modules() if isinstance(module, Int4LoRALinear)]
    return {layer.shared_input for layer in layers if layer.shared_input is not None}


def _empty_cache(cache: Cache) -> None:
    """A cache cannot be filled twice, so training runs without one. ValueError if it holds tokens already."""
    try:
        filled = cache.get_seq_length() > 0
    except ValueError:  # it has no attention layer
        filled = cache.has_previous_state()
    if filled:
        raise ValueError("past_key_values holds tokens: training through a filled cache is not supported")


def watch_training(model: PreTrainedModel, blocks_path: str, engine: BlockEngine) -> None:
    """While ``engine`` has the blocks, the module that runs them does so without a cache wherever a graph is made.

    It raises ValueError there if it is asked for what blocks compute within, such as attentions or router logits
    (for an auxiliary loss): taken out of a forward pass that has no graph, they would count without their gradient.
    """
    parts = blocks_path.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in reversed(range(len(parts))))
    decoder: Any = next(module for module in above if isinstance(module, PreTrainedModel))
    inner = {f"output_{name}" for name in getattr(decoder, "_can_record_outputs", None) or ()}
    inner |= {"output_attentions", "output_router_logits"}
    inner -= {"output_hidden_states"}  # between blocks: they have their gradient
    parameters = inspect.signature(decoder.forward).parameters.values()
    caches = any(parameter.name == "use_cache" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        def asked(name: str) -> bool:
            given = kwargs.get(name)
            return bool(getattr(decoder.config, name, False) if given is None else given)

        if engine.removed or not torch.is_grad_enabled():
            return None
        if not _any_moves(itertools.chain(tree_leaves((args, kwargs)), decoder.parameters())):
            return None
        if refused := next(filter(asked, sorted(inner)), None):
            raise ValueError(
                f"{refused}=True: what a block computes within has no gradient when it is trained block by block; "
                f"set {refused}=False, in the call or in the model's config"
            )
        if caches and asked("use_cache"):
            if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
                warnings.warn(
                    "gradients are on: the key-value cache stays empty; use torch.no_grad() to generate",
                    stacklevel=4,
                )
            kwargs["use_cache"] = False
        return args, kwargs

    decoder.register_forward_pre_hook(before, with_kwargs=True)


def _any_moves(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
