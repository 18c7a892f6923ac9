"""A batch through a block in chunks of rows, one after the other, while the block's weights are in place.

So weights are brought in once per pass, however many rows there are, and what a block computes inside exists for one
chunk at a time. Each chunk is a ``BlockRun`` with a block input, random numbers and a recompute of its own. The chunks'
outputs and the gradients of their inputs are written into whole tensors. Gradients of parameters, and of inputs that
all rows share, are added up in float32 or wider.

Which arguments have a row for each row of the batch, and in which dimension, is found when the model is loaded
(``models.row_places``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mebp_triton.kernels.panel import spans

from .backward import TENSOR, BlockRun
from .call import PLAIN, Arguments, Call, is_container

# For one block, the dimension in which a tensor among its arguments has the rows; None for one that all rows share.
RowPlaces = Mapping[str, int | None]


@dataclass(frozen=True)
class Cut:
    """How the arguments of a call are cut into chunks.

    Attributes:
        dims: for each leaf, the dimension of its rows, or None.
        spans: the first row of each chunk, and the one after its last.
        rows: those of the whole batch.
    """

    dims: list[int | None]
    spans: list[tuple[int, int]]
    rows: int

    def part(self, leaves: Sequence[Any], start: int, stop: int) -> list[Any]:
        """The leaves of a chunk, which share the memory of ``leaves``."""
        return [
            leaf if dim is None else leaf.narrow(dim, start, stop - start)
            for leaf, dim in zip(leaves, self.dims, strict=True)
        ]


def cut(places: RowPlaces, arguments: Arguments, hidden: Tensor, most: int) -> Cut | str:
    """Cuts a batch into chunks of ``most`` rows; or says why these arguments cannot be cut.

    Args:
        hidden: the hidden state ``[rows, tokens, ...]``.
    """
    dims: list[int | None] = []
    for path, leaf in zip(arguments.paths(), arguments.leaves, strict=True):
        if isinstance(leaf, Tensor):
            dim = _dim(places, path, leaf, hidden)
            if dim is not None and dim < 0:
                return f"the argument {path} has the shape {list(leaf.shape)} in a batch of {list(hidden.shape)}"
            dims.append(dim)
        elif isinstance(leaf, PLAIN) or is_container(leaf):
            dims.append(None)
        else:
            return f"the argument {path} is a {type(leaf).__name__}"
    rows = hidden.shape[0]
    return Cut(dims, list(spans(rows, most)), rows)


def _dim(places: RowPlaces, path: str, leaf: Tensor, hidden: Tensor) -> int | None:
    """The dimension in which ``leaf`` has the rows, None if it has none, -1 if that cannot be known."""
    rows = hidden.shape[0]
    if path in places:
        dim = places[path]
        size = None if dim is None else leaf.shape[dim] if dim < leaf.dim() else -1
        return dim if size in (None, rows) else None if size == 1 else -1
    # It was no tensor when the model was loaded, as a mask where nothing is padded; or it was one for all rows.
    if leaf.dim() == 0 or leaf.shape[0] == 1:
        return None
    return 0 if leaf.shape[:2] == hidden.shape[:2] and rows != hidden.shape[1] else -1


class _Outputs:
    """The outputs of all chunks, written into whole tensors ``[rows, ...]``."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tensors: list[Tensor] = []
        self.form: Any = None

    def add(self, tensors: Sequence[Tensor], form: Any, start: int, stop: int) -> None:
        """Takes in a chunk's output tensors, and its ``form``: everything else that the block returned.

        Raises:
            ValueError: they are not those of some rows.
        """
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        if start == 0:
            self.form = form
            self.tensors = [
                tensor.new_empty((self.rows, *shape)) for tensor, shape in zip(tensors, shapes, strict=True)
            ]
        same = form == self.form and shapes == [tuple(whole.shape[1:]) for whole in self.tensors]
        if not same or any(tensor.shape[:1] != (stop - start,) for tensor in tensors):
            raise ValueError(
                f"rows {start} to {stop} of a batch of {self.rows} came out of their block as tensors of the shapes "
                f"{[list(tensor.shape) for tensor in tensors]}: load this model with block_rows=None"
            )
        for whole, tensor in zip(self.tensors, tensors, strict=True):
            whole[start:stop] = tensor


def values(run: Callable[[Arguments, Call], Any], arguments: Arguments, live: Call, found: Cut) -> Any:
    """Returns what a block computes for the whole batch, chunk by chunk. No graph of autograd is made.

    Args:
        run: returns the block's output for the arguments of a chunk, given as such and as a call with them.
        live: the call with the original containers.
    """
    outputs = _Outputs(found.rows)
    for start, stop in found.spans:
        part = arguments.part(found.part(arguments.leaves, start, stop))
        call = part.call(part.leaves)
        output = run(part, call)
        leaves, spec = tree_flatten((output, call.written()))
        others = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs.add([leaf for leaf in leaves if isinstance(leaf, Tensor)], (others, spec), start, stop)
    others, spec = outputs.form
    given = iter(outputs.tensors)
    output, written = tree_unflatten([next(given) if leaf is TENSOR else leaf for leaf in others], spec)
    live.write(written)
    return output


class ChunkedRun(BlockRun):
    """One call of one block, whose batch goes through it in chunks.

    Args:
        cut: into which chunks.
        given: the arguments of ``BlockRun``.
    """

    def __init__(self, cut: Cut, *given: Any) -> None:
        super().__init__(*given)
        self.cut = cut
        self.chunks: list[BlockRun] = []

    def keep_input(self) -> None:
        """Keeps nothing: each chunk keeps its own rows."""

    def compute(self) -> tuple[Tensor, ...]:
        """Runs the block chunk by chunk. Returns the whole output tensors."""
        outputs = _Outputs(self.cut.rows)
        for start, stop in self.cut.spans:
            part = self.arguments.part(self.cut.part(self.leaves, start, stop))
            call = part.call(part.leaves)
            # Made right before it runs: it notes the random state, from which the chunk before has drawn.
            run = BlockRun(self.host, self.block, self.treatment, part, call, self.hidden, self.inputs, self.parameters)
            if self.treatment != "identity":
                run.keep_input()
            tensors = run.compute()
            run.live = None
            outputs.add(tensors, (run.output_leaves, run.output_spec), start, stop)
            self.chunks.append(run)
        self.output_leaves, self.output_spec = outputs.form
        self.leaves.clear()
        return tuple(outputs.tensors)

    def gradients(self, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Computes the gradients of ``backward`` chunk by chunk; the block's weights must be in place."""
        dims = [self.cut.dims[place] for place in self.inputs] + [None] * len(self.parameters)
        totals: list[Tensor | None] = [None] * len(needed)
        dtypes: list[torch.dtype | None] = [None] * len(needed)
        for run, (start, stop) in zip(self.chunks, self.cut.spans, strict=True):
            own = [None if grad is None else grad[start:stop] for grad in grads]
            for place, gradient in enumerate(run.gradients(own, needed)):
                if gradient is None:
                    continue
                dtypes[place] = gradient.dtype
                totals[place] = self._joined(totals[place], gradient, dims[place], start)
        return [total if total is None else total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True)]

    def _joined(self, total: Tensor | None, gradient: Tensor, dim: int | None, start: int) -> Tensor:
        """``total`` with a chunk's gradient: in the place of its rows, or added where all rows share what it is of."""
        if dim is None:
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            return wide if total is None else total + wide
        if total is None:
            shape = (*gradient.shape[:dim], self.cut.rows, *gradient.shape[dim + 1 :])
            total = gradient.new_zeros(shape)
        total.narrow(dim, start, gradient.shape[dim]).copy_(gradient)
        return total
