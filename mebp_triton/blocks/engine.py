"""MeBP (arXiv 2510.03425): every block is one autograd function that keeps its input and recomputes the rest.

``BlockEngine`` replaces each block's ``forward``. Under ``no_grad`` it only brings the block's weights in and lets them
go. With gradients on, the block runs without a graph and its input goes to the block input store; the backward pass
brings the weights in again, recomputes the block, and differentiates it (see ``backward``). Gradients of trainable
parameters are returned to autograd as those of the function's inputs, so accumulation, hooks and
``torch.autograd.grad`` work as in any other model.

The selection decides what happens to a block in a step (LCSB, arXiv 2602.13073):

========== ===================================== ==============================
treatment  gradient to the block's input         gradients of its parameters
========== ===================================== ==============================
train      true                                  true
exact      true                                  none
identity   ``dX = dY``; nothing read, recomputed none
========== ===================================== ==============================

"exact" costs a recompute and gives the blocks below their true gradients. "identity" treats the block as its residual
connection alone: it costs nothing, and what the gradient would have gained in the block is missing below it.

A block that is not trained, and whose input needs no gradient, has no backward pass at all. What blocks pass on beside
the hidden state has its gradient in the first two rows, and none in the third; see ``call``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mebp_triton.layers.shared_input import layers_by_input
from mebp_triton.layers.stacked_adapters import AdapterBuffers, BlockAdapters
from mebp_triton.store.block_inputs import BlockInputStore, DeviceBlockInputs
from mebp_triton.store.pages import Pages
from mebp_triton.store.waiting import Waiting

from . import leaks
from .backward import Block, BlockFunction, BlockRun
from .call import Arguments, Call, map_caches
from .graphs import BlockCall, BlockGraphs
from .recompute import Recompute
from .replay import ForwardState
from .row_chunks import ChunkedRun, Cut, RowPlaces, cut, values
from .runner import BlockRunner, hidden_state

T = TypeVar("T")


class BlockEngine(BlockRunner):
    """Runs the blocks of a model one by one.

    Args:
        blocks: the model's blocks, in order.
        pages: for each block, entered while its weights are needed; None if all weights stay in place.
        block_inputs: where the inputs of the blocks wait for the backward pass; by default on the device.
        keep_outputs: whether the outputs of the blocks' adapted layers wait there as well, so that a recompute has no
            matrix products.
        waiting: counts the time for which files are waited for.
        block_rows: the most rows of a batch that are in a block at once; None for whole batches. A larger batch goes
            through each block in chunks, see ``row_chunks``. Counters and the observer count a pass of a block once,
            whatever the number of chunks; hooks on modules inside a block see the chunks.
        row_places: for each block, where its arguments have the rows of a batch. Blocks take whole batches without.

    Attributes:
        graphs: plays the passes of blocks; None where every pass runs as usual.
    """

    graphs: BlockGraphs | None = None

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        pages: Sequence[Pages] | None = None,
        block_inputs: BlockInputStore | None = None,
        keep_outputs: bool = False,
        waiting: Waiting | None = None,
        block_rows: int | None = None,
        row_places: Sequence[RowPlaces] | None = None,
    ) -> None:
        super().__init__(blocks, self._run)
        self.pages: Sequence[Pages] = pages if pages is not None else [Pages()] * len(self.blocks)
        self.block_inputs = block_inputs if block_inputs is not None else DeviceBlockInputs()
        self.keep_outputs = keep_outputs
        self.waiting = Waiting() if waiting is None else waiting
        self.block_rows, self.row_places = block_rows, row_places
        self.recomputes = [Recompute(block) for block in self.blocks]
        self.adapter_buffers = AdapterBuffers()
        self.adapters = [BlockAdapters(layers_by_input(block), self.adapter_buffers) for block in self.blocks]
        self._told = False  # whether a compiler's user was told that blocks are not compiled
        self._unchecked = set(range(len(self.blocks)))  # blocks whose modules were not checked for leaks yet

    def remove(self) -> None:
        super().remove()
        self.adapter_buffers.clear()
        self.graphs = None

    def _enter(self, run: Callable[..., Any], index: int, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if torch.compiler.is_compiling() and not self.removed:
            self._say_not_compiled()
        return super()._enter(run, index, original, *args, **kw)

    @torch.compiler.disable
    def _say_not_compiled(self) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                "torch.compile leaves the blocks of this model as they are, since each is run and differentiated on "
                "its own; only what lies outside of the blocks is compiled",
                stacklevel=2,
            )

    # A compiler would trace the files and the recompute, and read memory that they fill as memory of a fake tensor.
    @torch.compiler.disable
    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            # Inference tensors could not be written to in a later step, so they get no static buffers.
            graphs = None if self.graphs is None or torch.is_inference_mode_enabled() else self.graphs
            return self._values(index, original, args, kwargs, graphs)
        arguments = Arguments(args, kwargs)
        if any(isinstance(leaf, Cache) for leaf in arguments.leaves) and self._makes_graph(arguments.leaves):
            # The recompute would fill a cache for a second time, so training runs without one.
            args, kwargs = map_caches(_no_cache, args, kwargs)
            arguments = Arguments(args, kwargs)
        treatment, leaves = self.treatment(index), arguments.leaves
        hidden = hidden_state(args, kwargs)
        inputs = [place for place, leaf in enumerate(leaves) if _requires_grad(leaf)]
        parameters = self.trainable(index) if treatment == "train" else []
        if self.is_below(index, bool(inputs)) or not inputs and not parameters:
            with torch.no_grad():
                return self._values(index, original, args, kwargs, self.graphs)
        place = next(place for place, leaf in enumerate(leaves) if leaf is hidden)
        block = Block(index, self.blocks[index], self.recomputes[index], original)
        live = Call(args, kwargs, arguments.containers)
        given = self, block, treatment, arguments, live, place, inputs, parameters
        cut = self._cut(index, hidden, arguments)
        run = BlockRun(*given) if cut is None else ChunkedRun(cut, *given)
        outputs = BlockFunction.apply(run, *(leaves[place] for place in inputs), *parameters)
        return run.rebuild(outputs)

    def _values(
        self,
        index: int,
        original: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        graphs: BlockGraphs | None = None,
    ) -> Any:
        """The block's output without a graph of autograd, from ``graphs`` if they are given."""
        recompute = self.recomputes[index]
        if self.block_rows is None and graphs is None:
            forward = functools.partial(original, *args, **kwargs)
            return self.run_forward(index, functools.partial(recompute.call, forward))
        arguments, hidden = Arguments(args, kwargs), hidden_state(args, kwargs)
        place = next(place for place, leaf in enumerate(arguments.leaves) if leaf is hidden)
        if any(isinstance(leaf, Cache) for leaf in arguments.leaves):
            graphs = None  # a graph would not fill it
        autocast = ForwardState(hidden.device, random=False).autocast

        def run(part: Arguments, call: Call) -> Any:
            forward = functools.partial(original, *call.args, **call.kwargs)
            if graphs is not None:
                played = BlockCall(index, original, part, part.leaves, place, autocast)
                forward = functools.partial(graphs.forward, played, forward)
            return recompute.call(forward)

        live, cut = Call(args, kwargs, arguments.containers), self._cut(index, hidden, arguments)
        whole = functools.partial(run, arguments, live)
        return self.run_forward(index, whole if cut is None else functools.partial(values, run, arguments, live, cut))

    def _cut(self, index: int, hidden: Tensor, arguments: Arguments) -> Cut | None:
        """How a batch is cut into chunks; None where it goes through the block as a whole."""
        most = self.block_rows
        if most is None or self.row_places is None or hidden.shape[0] <= most:
            return None
        if any(isinstance(leaf, Cache) for leaf in arguments.leaves):
            return None  # a cache has the keys and values of all rows
        found = cut(self.row_places[index], arguments, hidden, most)
        if isinstance(found, Cut):
            return found
        self.row_places = None
        warnings.warn(
            f"{found}: from here on, blocks take whole batches, and block_rows={most} changes nothing", stacklevel=2
        )
        return None

    def _makes_graph(self, leaves: list[Any]) -> bool:
        """Whether this forward pass makes a graph, in this block or in another."""
        return any(map(_requires_grad, leaves)) or any(self.trainable(index) for index in range(len(self.blocks)))

    def run_forward(self, index: int, forward: Callable[[], T]) -> T:
        with self.pages[index], self.adapters[index], _uncompiled():
            if index + 1 < len(self.blocks):
                self.pages[index + 1].prefetch()
            output = forward()
        self.counters.forward += 1
        self.observer("forward", index)
        return output

    def run_backward(self, index: int, backward: Callable[[], T], continues: bool) -> T:
        with self.pages[index], self.adapters[index], _uncompiled():
            # Next comes the nearest lower block that is read; after the last one, block 0 in the next step.
            below = reversed(range(index)) if continues else ()
            self.pages[next((lower for lower in below if self.treatment(lower) != "identity"), 0)].prefetch()
            gradients = backward()
        self.counters.recompute += 1
        self.observer("backward", index)
        return gradients

    def check_modules(self, index: int) -> None:
        if index in self._unchecked:
            self._unchecked.remove(index)
            leaks.check_modules(index, self.blocks)


def _uncompiled() -> AbstractContextManager[None]:
    """While active, parts of a block that were compiled run as they are.

    A compiler would keep what the layers' tapes and hooks were when it traced them, and gradients would be missing.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:  # nothing is compiled; to set the stance would load the compiler
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _no_cache(cache: Cache) -> None:
    """Stands for ``cache`` in training. Raises ValueError if the cache holds tokens, which attention would miss."""
    try:
        filled = cache.get_seq_length() > 0
    except ValueError:  # the cache has no attention layer
        filled = cache.has_previous_state()
    if filled:
        raise ValueError("past_key_values holds tokens: training through a filled cache is not supported")


def watch_training(model: PreTrainedModel, blocks_path: str, engine: BlockEngine) -> None:
    """Installs a hook on the module that runs the blocks, for forward passes that make a graph.

    The hook switches the key-value cache off, with a warning if the caller asked for one. It raises ValueError if the
    caller asks for something that blocks compute inside, such as attentions, or router logits for an auxiliary loss: a
    block's forward pass makes no graph, so such values would be in the loss and not in the gradient.

    Args:
        blocks_path: the path of the block list in ``model``.
        engine: the hook does nothing once it is removed.
    """
    parts = blocks_path.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in reversed(range(len(parts))))
    decoder: Any = next(module for module in above if isinstance(module, PreTrainedModel))
    decoder.register_forward_pre_hook(_TrainingWatch(decoder, engine).before, with_kwargs=True)


class _TrainingWatch:
    """The hook of ``watch_training``: an object, and no closure, so that a copy of the model has its own."""

    def __init__(self, decoder: Any, engine: BlockEngine) -> None:
        inner = {f"output_{name}" for name in getattr(decoder, "_can_record_outputs", None) or ()}
        inner |= {"output_attentions", "output_router_logits"}
        self.refused = sorted(inner - {"output_hidden_states"})  # these lie between blocks and have their gradient
        parameters = inspect.signature(decoder.forward).parameters
        self.caches = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.places = list(parameters)
        self.config, self.engine = decoder.config, engine

    def before(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if "use_cache" in self.places[: len(args)]:  # CPM-Ant gives it by its place
            args, kwargs = (), dict(zip(self.places, args, strict=False)) | kwargs

        def asked(name: str) -> bool:
            given = kwargs.get(name)
            return bool(getattr(self.config, name, False) if given is None else given)

        if self.engine.removed or not torch.is_grad_enabled():
            return None
        if not any(map(_requires_grad, itertools.chain(tree_leaves((args, kwargs)), decoder.parameters()))):
            return None
        if refused := next(filter(asked, self.refused), None):
            raise ValueError(
                f"{refused}=True: values from inside a block have no gradient when a model is trained block by block; "
                f"set {refused}=False, in the call or in the model's config"
            )
        if self.caches and asked("use_cache"):
            if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
                warnings.warn(
                    "gradients are on: the key-value cache stays empty; use torch.no_grad() to generate",
                    stacklevel=4,
                )
            kwargs["use_cache"] = False
        return args, kwargs
