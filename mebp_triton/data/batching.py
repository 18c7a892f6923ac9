"""The order in which a run takes its rows, and batches as tensors of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tokenized import IGNORE_INDEX, Example, TokenizedData

MOST_PADDING = 0.25  # where more would be padded, rows go through the model in one more pass


def evenly_spaced(data: Sized, count: int | None) -> list[int]:
    """The indices ``i * total // count``, the same every time; all indices where ``count`` is None or larger."""
    total = len(data)
    if count is None or count >= total:
        return list(range(total))
    if count < 1:
        raise ValueError(f"the number of windows must be at least 1, got {count}")
    return [i * total // count for i in range(count)]


def collate(
    examples: Sequence[Example],
    pad_token_id: int | None,
    padding_side: Literal["left", "right"] = "right",
    widths: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Pads rows to the longest: ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]`` int64.

    With ``widths`` (step, most) T is rounded up to a multiple of ``step``, but not beyond ``most``, so that few widths
    occur.

    Mask and labels are made from positions, never from ids, so the pad id may be 0, the end-of-sequence token, or None
    (a tokenizer without one).

    Packed rows have ``position_ids`` in place of the mask: transformers tells documents apart by positions that start
    again at 0, and only where no mask is given. Padding is a document of its own.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    longest = max(len(example.input_ids) for example in examples)
    if widths is not None:
        step, most = widths
        longest = max(longest, min(-(-longest // step) * step, most))
    input_ids = torch.full((len(examples), longest), pad_token_id or 0)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    position_ids = torch.zeros_like(input_ids)
    packed = examples[0].position_ids is not None
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        start = longest - length if padding_side == "left" else 0
        input_ids[row, start : start + length] = example.input_ids
        attention_mask[row, start : start + length] = 1
        labels[row, start : start + length] = example.labels
        if example.position_ids is not None:
            pads = torch.arange(longest - length)
            own = (pads, example.position_ids) if start else (example.position_ids, pads)
            position_ids[row] = torch.cat(own)
        if start:
            labels[row, start] = IGNORE_INDEX  # the shift would train the row's first token, from a pad's output
    documents = {"position_ids": position_ids} if packed else {"attention_mask": attention_mask}
    return {"input_ids": input_ids, **documents, "labels": labels}


def of_like_length(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """Sorts rows by length into groups, in each of which padding adds at most ``MOST_PADDING`` to the tokens.

    Where these would be more than ``most`` groups, neighbours that add the least padding become one.
    """
    groups: list[list[Example]] = []
    tokens = 0
    for example in sorted(examples, key=_length):
        length = _length(example)
        tokens += length
        if not groups or (len(groups[-1]) + 1) * length > (1 + MOST_PADDING) * tokens:
            groups.append([])
            tokens = length
        groups[-1].append(example)
    while len(groups) > most:
        added = [len(short) * (_length(long[-1]) - _length(short[-1])) for short, long in pairwise(groups)]
        least = added.index(min(added))
        groups[least : least + 2] = [groups[least] + groups[least + 1]]
    return groups


def _length(example: Example) -> int:
    return len(example.input_ids)


def valid_tokens(batch: Mapping[str, Tensor]) -> int:
    """The number of labels that count after the causal shift: the divisor of the loss."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on nothing but the arguments.

    It comes from sorting raw bits: numpy keeps that stream from version to version, unlike that of ``permutation``.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def batches_per_epoch(count: int, batch_size: int) -> int:
    """The number of batches that cover ``count`` rows; the last may be a partial one."""
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    return -(-count // batch_size)


def batches(
    data: TokenizedData, batch_size: int, seed: int, *, start_batch: int = 0, epochs: int | None = None
) -> Iterator[list[Example]]:
    """Yields batches, epoch after epoch, each in its own order; without end where ``epochs`` is None.

    ``start_batch=k`` gives exactly the batches k, k+1, ... of a run that started at 0.
    """
    per_epoch = batches_per_epoch(len(data), batch_size)
    if start_batch < 0 or per_epoch == 0:
        raise ValueError(f"start_batch must be at least 0 and data not empty, got {start_batch} and {len(data)} rows")
    epoch_order(0, seed, 0)  # a wrong seed is an error here, not at the first batch

    def generate() -> Iterator[list[Example]]:
        epoch, first = divmod(start_batch, per_epoch)
        while epochs is None or epoch < epochs:
            order = epoch_order(len(data), seed, epoch)
            for start in range(first * batch_size, len(data), batch_size):
                yield [data[int(index)] for index in order[start : start + batch_size]]
            epoch, first = epoch + 1, 0

    return generate()
