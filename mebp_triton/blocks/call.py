"""A block's arguments and results as flat lists of leaves.

One block may write to a dictionary or list among its arguments, and a later block may read it there, as the blocks of
Gemma 3n and Gemma 4 do that share keys and values. The entries of such a container count among a block's inputs, and
what the block writes into it counts among the outputs, so gradients flow both ways. Any other object is only looked at
(see ``leaks``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten
from transformers.cache_utils import Cache

# Leaves that are values alone and hold no tensor. Not so torch.Size: one may have the number of rows.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def is_container(leaf: Any) -> bool:
    """Whether a block may write to ``leaf``."""
    return isinstance(leaf, MutableMapping | list)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments; containers and caches are leaves as a whole."""
    return tree_flatten(
        (args, kwargs), lambda leaf: isinstance(leaf, Cache) or (is_container(leaf) and leaf is not kwargs)
    )


def _entries(container: Any) -> dict[Any, Any]:
    return dict(container if isinstance(container, Mapping) else enumerate(container))


class Call:
    """The arguments of one call, and what the call writes into the containers among them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], containers: list[Any]) -> None:
        self.args, self.kwargs, self.containers = args, kwargs, containers
        self._before = [_entries(container) for container in containers]

    def written(self) -> list[dict[Any, Any]]:
        """Returns, for each container, the entries that were added or replaced since this object was made."""
        return [
            {key: value for key, value in _entries(container).items() if key not in before or before[key] is not value}
            for container, before in zip(self.containers, self._before, strict=True)
        ]

    def write(self, entries: list[dict[Any, Any]]) -> None:
        """Puts entries into the containers; ``entries`` has the form that ``written`` returns."""
        for container, new in zip(self.containers, entries, strict=True):
            for key, value in new.items():
                container[key] = value


def map_caches(
    change: Callable[[Cache], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with each cache replaced by ``change(cache)``."""
    leaves, spec = _flat(args, kwargs)
    return tree_unflatten([change(leaf) if isinstance(leaf, Cache) else leaf for leaf in leaves], spec)


class Arguments:
    """Arguments as a list of leaves, followed by the leaves of the containers' entries.

    Attributes:
        leaves: tensors, containers (copied as they are before the call), caches, and whatever else there is.
        containers: the original containers, which the call writes to.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer, self._spec = _flat(args, kwargs)
        self._places = [place for place, leaf in enumerate(outer) if is_container(leaf)]
        self.containers = [outer[place] for place in self._places]
        inner, self._inner_spec = tree_flatten([_entries(container) for container in self.containers])
        for place in self._places:
            outer[place] = copy.copy(outer[place])
        self._count = len(outer)
        self.leaves: list[Any] = [*outer, *inner]

    def call(self, leaves: Sequence[Any]) -> Call:
        """A call with ``leaves`` in place of the original ones, and with containers of its own."""
        outer = list(leaves[: self._count])
        for place, entries in zip(
            self._places, tree_unflatten(list(leaves[self._count :]), self._inner_spec), strict=True
        ):
            outer[place] = copy.copy(outer[place])
            for key, value in entries.items():
                outer[place][key] = value
        args, kwargs = tree_unflatten(outer, self._spec)
        return Call(args, kwargs, [outer[place] for place in self._places])

    def part(self, leaves: Sequence[Any]) -> Arguments:
        """These arguments with ``leaves`` in place of the original ones. No call writes to the original containers."""
        made = copy.copy(self)
        made.leaves, made.containers = list(leaves), []
        return made

    def structure(self) -> Any:
        """How the leaves make up the arguments, as ``tree_unflatten`` takes it: of arguments without containers."""
        assert not self._places
        return self._spec

    def paths(self) -> list[str]:
        """Returns the path of each leaf in the arguments, which is the same in all calls that are written alike."""
        outer = tree_unflatten(list(range(self._count)), self._spec)
        inner = tree_unflatten(list(range(len(self.leaves) - self._count)), self._inner_spec)
        named = [*tree_flatten_with_path(outer)[0], *tree_flatten_with_path(("entries", inner))[0][1:]]
        return [keystr(path) for path, _ in named]

    def objects(self, call: Call) -> list[Any]:
        """The arguments of ``call`` that may hold tensors but are none: its containers, and all other objects."""
        others = (
            leaf for leaf in self.leaves[: self._count] if not isinstance(leaf, Tensor) and not is_container(leaf)
        )
        return [*call.containers, *others]
