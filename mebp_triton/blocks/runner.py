"""The repeated blocks of a Hugging Face model: finding them in its module tree, and running them in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Finds the decoder stack: the shallowest ``ModuleList`` with as many entries as the config has hidden layers.

    Where there are several, as in a model that has a tower for images beside the decoder, it is that of the decoder.
    Where there is none, it is the one list of blocks that transformers can checkpoint, if there is but one: a config
    may count the attentions of LongCat's blocks, which have two.

    Args:
        model: a transformers (or PEFT) model.
        path: the stack's path in the module tree, for a model where that rule does not find it.

    Returns:
        The path and the list.

    Raises:
        ValueError: no list fits, or several do at the same depth.
    """
    if path is not None:
        return path, _blocks_at(model, path)
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if type(count) is not int:
        raise ValueError(
            f"{type(model).__name__} does not say in its config how many blocks it has; name their list with "
            f"blocks='path.to.list'"
        )
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    if not lists:
        lists = [
            (name.count("."), name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module)
            and all(isinstance(entry, GradientCheckpointingLayer) for entry in module)
        ]
        lists = lists if len(lists) == 1 else []
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} blocks; name it with blocks='path.to.list'")
    depth = min(entry[0] for entry in lists)
    shallowest = [entry for entry in lists if entry[0] == depth]
    decoder: Any = getattr(model, "get_decoder", None)
    if len(shallowest) > 1 and decoder is not None:
        inside = set(decoder().modules())
        shallowest = [entry for entry in shallowest if entry[2] in inside] or shallowest
    if len(shallowest) > 1:
        names = ", ".join(entry[1] for entry in shallowest)
        raise ValueError(f"{type(model).__name__} has several lists of {count} blocks ({names}); choose with blocks=")
    return shallowest[0][1], shallowest[0][2]


def _blocks_at(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"blocks={path!r} is no module of {type(model).__name__}") from None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ValueError(f"blocks={path!r} is a {type(blocks).__name__}, wanted a ModuleList with entries")
    return blocks


Treatment = Literal["train", "exact", "identity"]
Event = Literal["forward", "backward"]


@dataclass
class Counters:
    """Counts of what the blocks did. The names are part of ``metrics.jsonl``, as ``blocks_forward`` and so on.

    Attributes:
        forward: forward passes of a block.
        recompute: forward passes that ran again for a backward pass.
        identity: blocks that the gradient passed unchanged.
        checkpoint: block inputs that were kept.
    """

    forward: int = 0
    recompute: int = 0
    identity: int = 0
    checkpoint: int = 0

    def pop_counts(self) -> dict[str, int]:
        """The counts since the last call."""
        counts = asdict(self)
        for name in counts:
            setattr(self, name, 0)
        return counts


def _train_all(index: int) -> Treatment:
    return "train"


def _ignore(event: Event, index: int) -> None:
    pass


class BlockRunner:
    """Replaces the ``forward`` of each block until ``remove``.

    Args:
        blocks: the model's blocks, in order.
        run: called instead of the forward of block i, with i, that forward, and its arguments.

    Attributes:
        treatment: how the selection treats block i in this step; without a selection, every block is trained.
        observer: called with (event, block index) after each block's forward and backward pass.
        outer_parameters: the model's parameters outside of the blocks; the selection sets them.

    Raises:
        ValueError: a block stands twice in the list, or has a runner already.
    """

    def __init__(self, blocks: Iterable[nn.Module], run: Callable[..., Any]) -> None:
        self.blocks = list(blocks)
        if len(set(map(id, self.blocks))) < len(self.blocks):
            raise ValueError("one block stands in several places of the list: shared blocks are not supported")
        self.treatment: Callable[[int], Treatment] = _train_all
        self.observer: Callable[[Event, int], None] = _ignore
        self.counters = Counters()
        self.outer_parameters: list[nn.Parameter] = []
        self._own_forwards = [block.__dict__.get("forward") for block in self.blocks]
        self._our_forwards: list[Any] = []
        self.removed = False
        others = (getattr(block.forward, "block_runner", None) for block in self.blocks)
        if any(other is not None and not other.removed for other in others):
            raise ValueError("the blocks have an engine already: remove() the other one, or use model.mebp.engine")
        for index, block in enumerate(self.blocks):
            wrapped = functools.wraps(block.forward)(functools.partial(self._enter, run, index, block.forward))
            wrapped.block_runner = self  # type: ignore[attr-defined]
            block.forward = wrapped  # type: ignore[method-assign]
            self._our_forwards.append(wrapped)

    def _enter(self, run: Callable[..., Any], index: int, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return original(*args, **kw) if self.removed else run(index, original, *args, **kw)

    def remove(self) -> None:
        """Gives every block its own forward back.

        Where another library has wrapped ours since, ours stays in place and only calls the block's own.
        """
        self.removed = True
        for block, own, ours in zip(self.blocks, self._own_forwards, self._our_forwards, strict=True):
            if block.__dict__.get("forward") is ours:
                del block.forward
                if own is not None:
                    block.forward = own

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model: the blocks, but neither a selection nor an observer of the original."""
        return vars(self) | {"treatment": _train_all, "observer": _ignore, "outer_parameters": []}

    def trainable(self, index: int) -> list[nn.Parameter]:
        """The parameters of block ``index`` that are trained when the block is selected."""
        return trainable_parameters(self.blocks[index])

    def selection_will_change(self) -> None:
        """Called before the selection chooses other blocks."""

    def is_below(self, index: int, requires_grad: bool) -> bool:
        """Whether no gradient is wanted through block ``index``, since it lies below all blocks that are trained.

        Args:
            requires_grad: one of the block's inputs requires a gradient. That counts only if something outside of the
                blocks is trained: for gradient checkpointing, trainers make inputs require gradients nobody wants.
        """
        if requires_grad and any(parameter.requires_grad for parameter in self.outer_parameters):
            return False
        return not any(self.treatment(lower) == "train" for lower in range(index + 1))


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` that require a gradient, in the order of ``module.parameters()``.

    Every pass of a block asks for them several times, and ``parameters()`` makes the name of each one.
    """
    found: dict[nn.Parameter, None] = {}
    _collect_trainable(module, found)
    return list(found)


def _collect_trainable(module: nn.Module, found: dict[nn.Parameter, None]) -> None:
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            found[parameter] = None
    for child in module._modules.values():
        if child is not None:
            _collect_trainable(child, found)


def hidden_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A block's input: its first positional argument, or the one named hidden_states."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError("a block was called without its hidden state as first or as hidden_states argument")
    return hidden
