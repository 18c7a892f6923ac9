"""Several rows in one, so that less padding is computed; none of them sees another.

Rows are put together by best-fit decreasing: the longest first, each where the least room is left. A packed row's
``position_ids`` start again at 0 with each document. From them transformers (4.53 and later) makes an attention mask
with a causal block for each document. Nothing predicts a document's first token, as if it stood alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .tokenized import IGNORE_INDEX, Example, TokenizedData


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Decides which rows go together: packed row ``i`` has the rows ``members[bounds[i] : bounds[i + 1]]``.

    Args:
        lengths: tokens of each row, at least 2 and at most ``capacity``.
        capacity: tokens of a packed row.

    Returns:
        members: a permutation of the rows' indices. bounds: where each packed row begins, and the end.
    """
    order = np.argsort(-lengths, kind="stable")
    place = np.empty(len(lengths), np.int64)  # the packed row of each row, in that order
    open_rows: dict[int, list[int]] = {}  # packed rows by the room that is left in them
    # Bit r of rooms says that a packed row has room r: the lowest bit from ``length`` on is the best fit.
    rooms, count = 0, 0
    for index, length in enumerate(lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            place[index] = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, place[index], count = capacity, count, count + 1
        left = room - length
        if left > 1:  # no row has one token
            open_rows.setdefault(left, []).append(int(place[index]))
            rooms |= 1 << left
    members = order[np.argsort(place, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=count))])
    return members, bounds.astype(np.int64)


class PackedData(TokenizedData):
    """The rows of ``data``, several in one; ``len`` and ``[i]`` count packed rows."""

    def __init__(self, data: TokenizedData, max_length: int) -> None:
        self.members, self.bounds = best_fit_decreasing(np.diff(data.offsets), max_length)
        packed = dataclasses.replace(data.report, packed_rows=len(self.bounds) - 1, packed_length=max_length)
        super().__init__(data.ids, data.trained, data.offsets, packed)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"packed row {index} of {len(self)}")
        inside = self.members[self.bounds[index] : self.bounds[index + 1]]
        documents = [self.row(int(member)) for member in inside]
        for document in documents:
            document.labels[0] = IGNORE_INDEX  # the shift would train it, from the output of the document before
        return Example(
            torch.cat([document.input_ids for document in documents]),
            torch.cat([document.labels for document in documents]),
            torch.cat([torch.arange(len(document.input_ids)) for document in documents]),
        )

    def checksum(self) -> int:
        return zlib.crc32(self.bounds.data, zlib.crc32(self.members.data, super().checksum()))


def pack(data: TokenizedData, max_length: int) -> PackedData:
    """Packs ``data`` into rows of at most ``max_length`` tokens. ValueError where one of its rows is longer."""
    longest = int(np.diff(data.offsets).max())
    if longest > max_length:
        raise ValueError(
            f"packing into rows of {max_length} tokens, but a row has {longest}: cut the rows to max_length"
        )
    return PackedData(data, max_length)


def check_packing(model: Any) -> None:
    """Checks by a gradient that ``model`` keeps the documents of a packed row apart: one pass over eight tokens.

    The loss of the second document must not depend on the first. So its gradient there must be exactly zero, since
    masked attention has the weight 0.

    Raises:
        ValueError: the documents are not kept apart.
    """
    kind = model.config.model_type
    advice = f"train models of type {kind} without packing"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"packing needs a model that takes position_ids, and {type(model).__name__} does not: {advice}"
        )
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    device = model.mebp.device
    ids = (torch.arange(8, device=device) % model.config.get_text_config().vocab_size)[None]
    labels = ids.masked_fill(torch.arange(8, device=device) < 5, IGNORE_INDEX)
    positions = torch.arange(4, device=device).repeat(2)[None]
    hook = model.get_input_embeddings().register_forward_hook(keep)
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, embedded)
    finally:
        hook.remove()
        model.train(training)
    if gradient[:, :4].count_nonzero() or not gradient[:, 4:].count_nonzero():
        raise ValueError(
            f"packing needs attention within each document, and {type(model).__name__} looks beyond: {advice}"
        )
