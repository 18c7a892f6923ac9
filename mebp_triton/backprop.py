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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .arguments import Arguments, Call, check_modules, check_objects, map_caches
from .blocks import BlockRunner, Treatment, hidden_state
from .lora import Int4LoRALinear
from .recompute import Recompute, Recording, Surroundings
from .siblings import Siblings
from .stores.checkpoints import Checkpoint, CheckpointStore, DeviceCheckpoints
from .stores.pages import Pages
from .stores.waiting import Waiting


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
        checkpoints: CheckpointStore | None = None,
        keep_outputs: bool = False,
        waiting: Waiting | None = None,
    ) -> None:
        super().__init__(blocks, self._run)
        self.pages: Sequence[Pages] = pages if pages is not None else [Pages()] * len(self.blocks)
        self.checkpoints = checkpoints if checkpoints is not None else DeviceCheckpoints()
        self.keep_outputs = keep_outputs
        self.waiting = Waiting() if waiting is None else waiting
        self.recomputes = [Recompute(block) for block in self.blocks]
        self.siblings = [_siblings_in(block) for block in self.blocks]
        self.unchecked = set(range(len(self.blocks)))  # the blocks whose attributes were not looked at yet

    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(index, original, args, kwargs)
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
                return self._forward(index, original, args, kwargs)
        place = next(place for place, leaf in enumerate(leaves) if leaf is hidden)
        live = Call(args, kwargs, arguments.containers)
        run = _BlockRun(self, index, original, arguments, live, moving, place, treatment, parameters)
        outputs = _BlockFunction.apply(run, *(leaves[place] for place in moving), *parameters)
        return run.rebuild(outputs)

    def _trains_any(self, leaves: list[Any]) -> bool:
        """Whether this forward pass makes a graph, here or in another block."""
        return _any_moves(leaves) or any(self.trainable(index) for index in range(len(self.blocks)))

    def _forward(self, index: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self.pages[index]:
            if index + 1 < len(self.blocks):
                self.pages[index + 1].prefetch()
            output = self._call(index, functools.partial(original, *args, **kwargs))
        self.counters.forward += 1
        self.observer("forward", index)
        return output

    def prefetch_below(self, index: int) -> None:
        """The block whose backward pass comes after that of ``index``; after the last one's, the next step's first."""
        below = (lower for lower in reversed(range(index)) if self.treatment(lower) != "identity")
        self.pages[next(below, 0)].prefetch()

    def _call(self, index: int, run: Callable[[], Any]) -> Any:
        """Runs a block's own forward; afterwards no layer keeps an output for another."""
        try:
            return run()
        finally:
            for siblings in self.siblings[index]:
                siblings.forget()


def _siblings_in(block: nn.Module) -> set[Siblings]:
    layers = [module for module in block.modules() if isinstance(module, Int4LoRALinear)]
    return {layer.siblings for layer in layers if layer.siblings is not None}


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


class _BlockRun:
    """One call of one block, from its forward to its backward."""

    def __init__(
        self,
        engine: BlockEngine,
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
        self.surroundings = Surroundings(leaves[hidden].device, random=self.training)
        self.checkpoint: Checkpoint | None = None
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
            output = self.engine._forward(self.index, self.original, self.live.args, self.live.kwargs)
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
            output = self.engine._call(self.index, functools.partial(self.original, *call.args, **call.kwargs))
        outputs = [leaf for leaf in tree_flatten((output, call.written()))[0] if isinstance(leaf, Tensor)]
        check_objects(self.index, self.arguments.objects(call), outputs)
        return outputs


_TENSOR = object()


@contextmanager
def _only_trainable(run: _BlockRun) -> Iterator[None]:
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


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _BlockRun, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        outputs = run.forward()
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _BlockRun = ctx.run
        needed = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None, *[None] * len(needed))
        if run.treatment == "identity":
            run.engine.counters.identity += 1
            return (None, *(grads[0] if place == run.hidden else None for place in run.moving))
        return (None, *run.backward(grads, needed))
