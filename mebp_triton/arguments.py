"""A block's arguments and results as flat lists, and the ways by which a tensor may leave a block unseen.

A dictionary or list among the arguments may be written to by one block and read by a later one, as the keys and values
that blocks of Gemma 3n and Gemma 4 share. What lies in it counts among the block's inputs, and what the block puts into
it among its outputs, so gradients go both ways. Any other object is only looked at.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache


def _is_container(leaf: Any) -> bool:
    return isinstance(leaf, MutableMapping | list)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Containers and caches are leaves."""
    return tree_flatten(
        (args, kwargs), lambda leaf: isinstance(leaf, Cache) or (_is_container(leaf) and leaf is not kwargs)
    )


def _entries(container: Any) -> dict[Any, Any]:
    return dict(container if isinstance(container, Mapping) else enumerate(container))


class Call:
    """The arguments of one call, and what it puts into the containers among them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], containers: list[Any]) -> None:
        self.args, self.kwargs, self.containers = args, kwargs, containers
        self._before = [_entries(container) for container in containers]

    def written(self) -> list[dict[Any, Any]]:
        """By container, the entries that are new or others than before the call."""
        return [
            {key: value for key, value in _entries(container).items() if key not in before or before[key] is not value}
            for container, before in zip(self.containers, self._before, strict=True)
        ]

    def write(self, entries: list[dict[Any, Any]]) -> None:
        """Puts them into the containers, as ``written`` gave them."""
        for container, new in zip(self.containers, entries, strict=True):
            for key, value in new.items():
                container[key] = value


def map_caches(
    change: Callable[[Cache], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with what ``change`` makes of each cache in its place."""
    leaves, spec = _flat(args, kwargs)
    return tree_unflatten([change(leaf) if isinstance(leaf, Cache) else leaf for leaf in leaves], spec)


class Arguments:
    """Arguments as a list of leaves, with what lies in containers after the others.

    Attributes:
        leaves: tensors, containers (copies, as they are before the call), caches, and whatever else there is.
        containers: the real ones, which the call writes to.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer, self._spec = _flat(args, kwargs)
        self._places = [place for place, leaf in enumerate(outer) if _is_container(leaf)]
        self.containers = [outer[place] for place in self._places]
        inner, self._inner_spec = tree_flatten([_entries(container) for container in self.containers])
        for place in self._places:
            outer[place] = copy.copy(outer[place])
        self._count = len(outer)
        self.leaves: list[Any] = [*outer, *inner]

    def call(self, leaves: Sequence[Any]) -> Call:
        """A call with other ``leaves``, in containers of its own."""
        outer = list(leaves[: self._count])
        for place, entries in zip(
            self._places, tree_unflatten(list(leaves[self._count :]), self._inner_spec), strict=True
        ):
            outer[place] = copy.copy(outer[place])
            for key, value in entries.items():
                outer[place][key] = value
        args, kwargs = tree_unflatten(outer, self._spec)
        return Call(args, kwargs, [outer[place] for place in self._places])

    def objects(self, call: Call) -> list[Any]:
        """What may hold tensors without being one: the containers of ``call``, and other objects among the leaves."""
        others = (
            leaf for leaf in self.leaves[: self._count] if not isinstance(leaf, Tensor) and not _is_container(leaf)
        )
        return [*call.containers, *others]


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
