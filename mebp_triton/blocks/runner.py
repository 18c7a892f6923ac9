"""The repeated blocks of a Hugging Face model: found in its module tree, and run by someone else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The decoder stack: the shallowest ``ModuleList`` with as many entries as the config has hidden layers.

    Args:
        model: a transformers (or PEFT) model.
        path: the stack's path in the module tree, where the rule does not find it.

    Returns:
        The path and the list.

    Raises:
        ValueError: no list fits, or several do at the same depth.
    """
    if path is not None:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"blocks={path!r} is no module of {type(model).__name__}") from None
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise ValueError(f"blocks={path!r} is a {type(found).__name__}, wanted a ModuleList with entries")
        return path, found
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} blocks; name it with blocks='path.to.list'")
    depth = min(entry[0] for entry in lists)
    shallowest = [entry for entry in lists if entry[0] == depth]
    if len(shallowest) > 1:
        names = ", ".join(entry[1] for entry in shallowest)
        raise ValueError(f"{type(model).__name__} has several lists of {count} blocks ({names}); choose with blocks=")
    return shallowest[0][1], shallowest[0][2]


Treatment = Literal["train", "exact", "identity"]
Event = Literal["forward", "backward"]


@dataclass
class Counters:
    """How often a block's forward ran, was computed again, and was passed by; and how many inputs were kept."""

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


class BlockRunner:
    """Stands in the place of each block's ``forward``, until ``remove``.

    Args:
        blocks: the model's blocks, in order.
        run: called in place of block i's forward with i, that forward, and its arguments.

    Attributes:
        treatment: what the selection says of block i at this step; all "train" without one.
        observer: called with (event, block index) after each block's forward and backward.
        around: the model's parameters outside of the blocks, as far as a selection named them.
    """

    def __init__(self, blocks: Iterable[nn.Module], run: Callable[..., Any]) -> None:
        self.blocks = list(blocks)
        if len(set(map(id, self.blocks))) < len(self.blocks):
            raise ValueError("one block stands in several places of the list: shared blocks are not supported")
        self.treatment: Callable[[int], Treatment] = lambda index: "train"
        self.observer: Callable[[Event, int], None] = lambda event, index: None
        self.counters = Counters()
        self.around: list[nn.Parameter] = []
        self._had = [block.__dict__.get("forward") for block in self.blocks]
        self._put: list[Any] = []
        self.removed = False
        others = (getattr(block.forward, "block_runner", None) for block in self.blocks)
        if any(other is not None and not other.removed for other in others):
            raise ValueError("the blocks have an engine already: remove() the other one, or use model.mebp.engine")
        for index, block in enumerate(self.blocks):
            wrapped = functools.wraps(block.forward)(functools.partial(self._enter, run, index, block.forward))
            wrapped.block_runner = self  # type: ignore[attr-defined]
            block.forward = wrapped  # type: ignore[method-assign]
            self._put.append(wrapped)

    def _enter(self, run: Callable[..., Any], index: int, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return original(*args, **kw) if self.removed else run(index, original, *args, **kw)

    def remove(self) -> None:
        """Gives every block the forward back that it had; where others wrapped ours since, it only calls that."""
        self.removed = True
        for block, had, put in zip(self.blocks, self._had, self._put, strict=True):
            if block.__dict__.get("forward") is put:
                del block.forward
                if had is not None:
                    block.forward = had

    def trainable(self, index: int) -> list[nn.Parameter]:
        """The block's parameters that require a gradient."""
        return [parameter for parameter in self.blocks[index].parameters() if parameter.requires_grad]

    def selected_anew(self) -> None:
        """The selection is about to change."""

    def is_below(self, index: int, moving: bool) -> bool:
        """Whether no gradient is wanted through the block: it lies below the lowest that is trained at this step.

        ``moving``: one of its inputs requires a gradient. That only counts where something outside of the blocks is
        trained: gradient checkpointing lets inputs require gradients that nobody wants.
        """
        if moving and any(parameter.requires_grad for parameter in self.around):
            return False
        return not any(self.treatment(place) == "train" for place in range(index + 1))


def hidden_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A block's input: its first positional argument, or the one of that name."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError("a block was called without its hidden state as first or as hidden_states argument")
    return hidden
