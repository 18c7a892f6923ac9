"""Finds tensors that leave a block by a way other than its outputs, and would lose their gradient.

The forward pass of a block makes no graph. A tensor that the block leaves in an object or a module has no gradient
there, and a later block that reads it would be trained wrongly without any sign. A recompute does make a graph, so it
shows such tensors: they have a ``grad_fn``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .call import PLAIN


def check_objects(index: int, objects: Iterable[Any], outputs: Iterable[Any]) -> None:
    """Checks the objects among a block's arguments after a recompute.

    Args:
        index: the block's.
        objects: those of its arguments that are no tensors.
        outputs: the tensors that are known to be the block's outputs, which may be anywhere.

    Raises:
        ValueError: the block left another tensor with a gradient in one of ``objects``.
    """
    known = {id(output) for output in outputs}
    for thing in objects:
        if isinstance(thing, PLAIN):
            continue
        if _has_lost(thing, known) or _has_lost(getattr(thing, "__dict__", None), known):
            raise ValueError(_lost(index, f"its argument {type(thing).__name__}"))


def check_modules(index: int, blocks: Sequence[nn.Module]) -> None:
    """Checks the attributes of block ``index`` and of the modules in it after a recompute.

    It warns of a tensor with a gradient in a module of this block alone, which may be a state that nothing else reads.

    Raises:
        ValueError: the block left such a tensor in a module that is part of another block too.
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
    """The tensors in ``thing``: itself, or those in dictionaries, lists, tuples and sets down to ``depth``."""
    if isinstance(thing, Tensor):
        yield thing
    elif depth and isinstance(thing, Mapping | list | tuple | set):
        for value in thing.values() if isinstance(thing, Mapping) else thing:
            yield from _tensors(value, depth - 1)
