"""The ways by which a tensor may leave a block unseen, and lose its gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def check_objects(index: int, objects: Iterable[Any], outputs: Iterable[Any]) -> None:
    """ValueError where block ``index`` left a tensor with a gradient in one of ``objects``, of its arguments.

    Later blocks may read it there, and got it from a forward pass that has no graph. ``outputs``: tensors that are
    known to be the block's outputs.
    """
    known = {id(output) for output in outputs}
    for thing in objects:
        if _has_lost(thing, known) or _has_lost(getattr(thing, "__dict__", None), known):
            raise ValueError(_lost(index, f"its argument {type(thing).__name__}"))


def check_modules(index: int, blocks: Sequence[nn.Module]) -> None:
    """``check_objects`` of the attributes of block ``index`` and its modules.

    A warning for those of its own, which may be a state that nobody else reads; ValueError where the module is in
    another block too.
    """
    for path, module in blocks[index].named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_modules") or not _has_lost(value, set()):
                continue
            problem = _lost(index, ".".join(filter(None, (path, name))))
            if any(module in set(other.modules()) for other in blocks if other is not blocks[index]):
                raise ValueError(problem)
            warnings.warn(problem, stacklevel=2)


def _lost(index: int, where: str) -> str:
    return (
        f"block {index} leaves a tensor in {where} without its gradient: "
        f"a model that reads it outside of the block cannot be trained block by block"
    )


def _has_lost(thing: Any, known: set[int]) -> bool:
    return any(tensor.grad_fn is not None and id(tensor) not in known for tensor in _tensors(thing))


def _tensors(thing: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in ``thing``: itself, or in dictionaries, lists, tuples and sets."""
    if isinstance(thing, Tensor):
        yield thing
    elif depth and isinstance(thing, Mapping | list | tuple | set):
        for value in thing.values() if isinstance(thing, Mapping) else thing:
            yield from _tensors(value, depth - 1)
