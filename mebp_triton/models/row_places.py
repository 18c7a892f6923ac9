"""Finds where the arguments of a model's blocks have the rows of a batch, by running it with batches of two sizes.

So nothing is guessed from the sizes of one call, where a batch may have as many rows as a row has tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mebp_triton.blocks.call import Arguments, Call
from mebp_triton.blocks.row_chunks import RowPlaces
from mebp_triton.blocks.runner import hidden_state

from .skeleton import meta_model, run_on_meta

SIZES = (3, 5)  # rows of the two batches; a row has two tokens


def find_row_places(config: Any, blocks: str) -> list[RowPlaces]:
    """Finds the dimension of the rows of each argument of each block, by the argument's path.

    Args:
        config: the model's config.
        blocks: the path of the block list in the model.

    Raises:
        ValueError: the model does not run on the meta device, or what goes into a block or comes out cannot be cut into
            rows. The message says which.
    """
    model = meta_model(config)
    small, large = (_calls(model, blocks, rows) for rows in SIZES)
    return [_places(f"block {index}", *calls) for index, calls in enumerate(zip(small, large, strict=True))]


def check_block_rows(rows: int | None) -> None:
    """ValueError if ``rows`` is neither a number of rows nor None."""
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ValueError(f"block_rows must be a number of rows, at least 1, or None for whole batches, got {rows!r}")


def row_places(config: Any, blocks: str, rows: int | None) -> list[RowPlaces] | None:
    """What ``find_row_places`` returns; None, with a warning, where blocks take whole batches, or for ``rows`` None.

    Raises:
        ValueError: ``rows`` is not a number of rows.
    """
    check_block_rows(rows)
    if rows is None:
        return None
    try:
        return find_row_places(config, blocks)
    except ValueError as error:
        warnings.warn(f"{error}; its blocks take whole batches, and block_rows={rows} changes nothing", stacklevel=3)
        return None


_Seen = tuple[dict[str, Any], list[Any]]  # what goes into a block, by path, and what comes out


def _calls(model: Any, blocks: str, rows: int) -> list[_Seen]:
    """What goes into each block and comes out, with ``rows`` rows."""
    stack: Any = model.get_submodule(blocks)
    seen: list[_Seen] = [({}, []) for _ in stack]
    live: dict[int, Call] = {}

    def watch(index: int, block: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = Arguments(args, kwargs)
            hidden, leaves = hidden_state(args, kwargs), arguments.leaves
            live[index] = Call(args, kwargs, arguments.containers)
            seen[index][0].update(zip(arguments.paths(), map(_seen, leaves), strict=True))
            seen[index][1].append(_seen(hidden))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[index][1].extend(map(_seen, tree_leaves((output, live[index].written()))))

        return [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after, with_kwargs=True),
        ]

    handles = [handle for index, block in enumerate(stack) for handle in watch(index, block)]
    try:
        run_on_meta(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _seen(leaf: Any) -> Any:
    """A tensor's shape; of other leaves, what may depend on the number of rows."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf)


def _places(block: str, small: _Seen, large: _Seen) -> RowPlaces:
    """The dimension of the rows of each argument. ValueError where something cannot be cut into rows."""
    if small[0].keys() != large[0].keys() or len(small[1]) != len(large[1]):
        raise ValueError(f"{block} has other arguments or outputs in a batch of another size")
    for before, now in zip(small[1], large[1], strict=True):  # the hidden state, then the outputs
        if _dim(f"the hidden state or an output of {block}", before, now) != (0 if isinstance(now, tuple) else None):
            raise ValueError(f"an output of {block} is {before}, where rows are not the first dimension")
    found = {path: _dim(f"the argument {path} of {block}", seen, large[0][path]) for path, seen in small[0].items()}
    # One that is the same for all rows and has room for them may have them in another call.
    known = {path for path, seen in small[0].items() if isinstance(seen, tuple) and seen[:1] != (1,)}
    return {path: dim for path, dim in found.items() if path in known}


def _dim(what: str, small: Any, large: Any) -> int | None:
    """The one dimension that is the number of rows; None where nothing depends on that."""
    if small == large:
        return None
    if isinstance(small, tuple) and isinstance(large, tuple) and len(small) == len(large):
        dims = [dim for dim, sizes in enumerate(zip(small, large, strict=True)) if sizes[0] != sizes[1]]
        if len(dims) == 1 and (small[dims[0]], large[dims[0]]) == SIZES:
            return dims[0]
    raise ValueError(f"{what} is {small} in a batch of {SIZES[0]} rows and {large} in one of {SIZES[1]}")
