"""A block's arguments and results as flat lists, and the ways by which a tensor may leave a block unseen.

A dictionary or list among the arguments may be written to by one block and read by a later one, as the keys and values
that blocks of Gemma 3n and Gemma 4 share. What lies in it counts among the block's inputs, and what the block puts into
it among its outputs, so gradients go both ways. Any other object is only looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
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
