"""The block types of GGUF: from a matrix's bytes to its codes, scales and minima, which give every value exactly.

A row is a chain of blocks of 32 or 256 weights, each with its own scales. ggml decodes a block in float32; the
``CodedMatrix`` that is read here decodes to the same bits.

Layouts: ``ggml-common.h`` and ``ggml-quants.c`` of https://github.com/ggml-org/ggml
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .coded_matrix import E2M1, CodedMatrix, even_groups, powers_of_two

PANEL_ELEMENTS = 1 << 22  # what is taken apart at a time: the pieces of a panel need some 10 bytes for each weight
IQ4_LEVELS = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
MXFP4_LEVELS = E2M1 + 0.0  # ggml has no -0


class Panel(NamedTuple):
    """Some rows of a matrix: codes uint8; scales, and a minimum if there is one; see ``CodedMatrix``.

    All are ``[N, blocks, ...]``, in the order of columns.
    """

    codes: Tensor
    scales: Tensor
    minimum: Tensor | None = None
    super_scales: Tensor | None = None
    super_minimum: Tensor | None = None


def read_blocks(kind: str, shape: tuple[int, int], rows: Callable[[int, int], Tensor]) -> CodedMatrix:
    """Reads a matrix, some rows at a time.

    Args:
        kind: one of ``TYPES``.
        shape: ``(N, K)``.
        rows: gives the bytes of rows from one to before another, ``[rows, bytes of a row]`` uint8.
    """
    block = TYPES[kind]
    codes = torch.empty(shape, dtype=torch.uint8)
    numbers: dict[str, list[Tensor]] = {}
    step = PANEL_ELEMENTS // shape[1] + 1
    for start in range(0, shape[0], step):
        part = codes[start : start + step]
        data = rows(start, start + len(part))
        read = block.read(data.view(len(part), shape[1] // block.weights, block.nbytes))._asdict()
        part.copy_(read.pop("codes").flatten(1))
        for name, numbers_of_part in read.items():
            if numbers_of_part is not None:
                numbers.setdefault(name, []).append(numbers_of_part.flatten(1))
    joined = {name: torch.cat(parts).t() for name, parts in numbers.items()}
    size = shape[1] // len(joined["scales"])
    groups = even_groups(shape[1], size)
    return CodedMatrix(codes, block.bits, groups=groups, group_size=size, levels=LEVELS_OF.get(kind), **joined)


def _half(part: Tensor) -> Tensor:
    """The float16 numbers ``[..., B / 2]`` that some bytes ``[..., B]`` are."""
    return part.contiguous().view(torch.float16)


def _nibbles(part: Tensor) -> Tensor:
    """``[..., B]`` -> ``[..., 2, B]``: all low nibbles, then all high ones."""
    return torch.stack((part & 15, part >> 4), -2)


def _bits(part: Tensor, width: int) -> Tensor:
    """``[..., B]`` -> ``[..., 8 / width, B]``: the lowest ``width`` bits of all bytes, then the next, and so on."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    return part.unsqueeze(-2) >> shifts.unsqueeze(-1) & (1 << width) - 1


def _q4_0(blocks: Tensor) -> Panel:
    return Panel(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]))


def _q4_1(blocks: Tensor) -> Panel:
    scale, minimum = _half(blocks[..., :4]).unbind(-1)
    return Panel(_nibbles(blocks[..., 4:]), scale, minimum)


def _five_bits(blocks: Tensor) -> Tensor:
    """Codes of 32 weights: a word with bit j of weight j, then 16 bytes of nibbles."""
    fifth = _bits(blocks[..., :4], 1).transpose(-1, -2).reshape(*blocks.shape[:-1], 2, 16)
    return _nibbles(blocks[..., 4:]) | fifth << 4


def _q5_0(blocks: Tensor) -> Panel:
    return Panel(_five_bits(blocks[..., 2:]), _half(blocks[..., :2]))


def _q5_1(blocks: Tensor) -> Panel:
    scale, minimum = _half(blocks[..., :4]).unbind(-1)
    return Panel(_five_bits(blocks[..., 4:]), scale, minimum)


def _q8_0(blocks: Tensor) -> Panel:
    # A signed byte plus 128 is that byte with its highest bit turned.
    return Panel(blocks[..., 2:] ^ 128, _half(blocks[..., :2]))


def _two_levels(head: Tensor) -> dict[str, Tensor]:
    """Scales and minima from two float16 numbers of a block, and 8 pairs of 6 bits in 12 bytes.

    ggml subtracts a minimum. Its negative is added here, and the float16 number has the sign, which a zero keeps so.
    """
    scale, least = _half(head[..., :4]).unbind(-1)
    first, second, rest = head[..., 4:].unflatten(-1, (3, 4)).unbind(-2)
    steps = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1).view(torch.int8)
    offsets = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1).view(torch.int8)
    return {"scales": steps, "minimum": offsets, "super_scales": scale, "super_minimum": -least}


def _q4_k(blocks: Tensor) -> Panel:
    return Panel(_nibbles(blocks[..., 16:].unflatten(-1, (4, 32))), **_two_levels(blocks[..., :16]))


def _q5_k(blocks: Tensor) -> Panel:
    nibbles = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32)))
    fifth = _bits(blocks[..., 16:48], 1).view_as(nibbles)
    return Panel(nibbles | fifth << 4, **_two_levels(blocks[..., :16]))


def _q6_k(blocks: Tensor) -> Panel:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))  # [N, blocks, half, 2, 64]
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2)  # [N, blocks, half, 4, 32]
    steps = blocks[..., 192:208].contiguous().view(torch.int8)
    return Panel(low.view_as(high) | high << 4, steps, super_scales=_half(blocks[..., 208:]))


def _iq4_xs(blocks: Tensor) -> Panel:
    upper = _bits(blocks[..., 2:4], 2).transpose(-1, -2)  # of groups 0 to 3, and of groups 4 to 7
    lower = _nibbles(blocks[..., 4:8]).transpose(-1, -2)  # of groups 0 and 1, and so on
    steps = (lower.flatten(-2) | upper.flatten(-2) << 4).to(torch.int8) - 32
    return Panel(_nibbles(blocks[..., 8:].unflatten(-1, (8, 16))), steps, super_scales=_half(blocks[..., :2]))


def _mxfp4(blocks: Tensor) -> Panel:
    return Panel(_nibbles(blocks[..., 1:]), powers_of_two(blocks[..., 0]))


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        weights, nbytes: how many weights a block has, and how many bytes.
        bits: the width of its codes. Without a minimum or levels, the middle code is 0.
        read: takes blocks ``[N, blocks, nbytes]`` apart.
    """

    weights: int
    nbytes: int
    bits: int
    read: Callable[[Tensor], Panel]


TYPES = {
    "Q4_0": BlockType(32, 18, 4, _q4_0),
    "Q4_1": BlockType(32, 20, 4, _q4_1),
    "Q5_0": BlockType(32, 22, 5, _q5_0),
    "Q5_1": BlockType(32, 24, 5, _q5_1),
    "Q8_0": BlockType(32, 34, 8, _q8_0),
    "Q4_K": BlockType(256, 144, 4, _q4_k),
    "Q5_K": BlockType(256, 176, 5, _q5_k),
    "Q6_K": BlockType(256, 210, 6, _q6_k),
    "IQ4_NL": BlockType(32, 18, 4, _q4_0),  # with levels in place of numbers
    "IQ4_XS": BlockType(256, 136, 4, _iq4_xs),
    "MXFP4": BlockType(32, 17, 4, _mxfp4),
}
LEVELS_OF = {"IQ4_NL": IQ4_LEVELS, "IQ4_XS": IQ4_LEVELS, "MXFP4": MXFP4_LEVELS}
