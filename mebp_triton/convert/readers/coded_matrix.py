"""A matrix of integer codes as a foreign checkpoint has it, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mebp_triton.kernels.layout import SUPER_GROUP, Int4Weight, group_count, middle_code, pack, packed_columns
from mebp_triton.kernels.names import GROUP_SIZES_OF_BITS

# The 16 values of E2M1, the 4-bit float of MXFP4 (OCP Microscaling Formats, version 1.0), by their codes.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PARTS = ("scales", "minimum", "super_scales", "super_minimum")
PANEL_ELEMENTS = 1 << 22  # how much is unpacked or decoded at a time


class Decoded(NamedTuple):
    """A matrix whose codes do not even lie in groups of columns.

    Attributes:
        weight: ``[N, K]`` float32.
        codes: what the codes are, in words.
    """

    weight: Tensor
    codes: str


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix ``[N, K]`` of codes in groups of columns that share a scale.

    A weight is ``levels[code] * scale`` with levels, ``code * scale + minimum`` with a minimum, and otherwise
    ``(code - 2 ** (bits - 1)) * scale``, all in float32.

    Attributes:
        codes: ``[N, K]`` uint8; or what unpacks them, from one row to before another.
        bits: the width of a code.
        scales: ``[groups, N]``, of a float dtype; or int8 with ``super_scales``.
        groups: ``[K]`` int64, the group of each column.
        group_size: the number of columns in a group.
        minimum: ``[groups, N]``, as ``scales``, or None.
        levels: ``[2 ** bits]`` float32, or None.
        super_scales: ``[ceil(K / 256), N]`` float16, by which the scales of 256 columns are multiplied in float32; or
            None. Then groups follow each other, and none lies in two stretches of 256.
        super_minimum: likewise for ``minimum``.
    """

    codes: Tensor | Callable[[int, int], Tensor]
    bits: int
    scales: Tensor
    groups: Tensor
    group_size: int
    minimum: Tensor | None = None
    levels: Tensor | None = None
    super_scales: Tensor | None = None
    super_minimum: Tensor | None = None

    @property
    def _middle(self) -> int:
        """The code that is 0 where there is neither a minimum nor levels."""
        return middle_code(self.bits)

    def with_zeros(self, zeros: Tensor) -> CodedMatrix:
        """The matrix of ``(code - zero) * scale``, by the zero of each group, ``[groups, N]``.

        It has no minimum where every zero is the middle code. A scale of 16 bits times a zero is exact in float32.
        """
        if bool((zeros == self._middle).all()):
            return self
        return replace(self, minimum=-(zeros.float() * self.scales.float()))

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], len(self.groups)

    def _panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their codes, some at a time."""
        rows, columns = self.shape
        step = max(1, PANEL_ELEMENTS // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, self.codes[part] if isinstance(self.codes, Tensor) else self.codes(part.start, part.stop)

    def to_int4(self) -> Int4Weight | None:
        """The same weights in our layout, with the codes of 4 or 8 bits that hold theirs; None where none do.

        Codes of 4 bits become codes of 8 where only those have the groups, of 16. Codes of 8 bits may be shared: a copy
        of a large table is more than reading it takes.
        """
        form = self._our_form()
        if form is None:
            return None
        bits, size = form
        columns, starts = self.shape[1], self.groups[::size]
        pad = (0, 0, 0, group_count(columns, size) - len(starts))
        numbers = {"scales": self.scales, "minimum": self.minimum}
        parts = {name: tensor.index_select(0, starts) for name, tensor in numbers.items() if tensor is not None}
        dtype = self._scale_dtype(parts.values())
        parts = {name: torch.nn.functional.pad(tensor.to(dtype), pad) for name, tensor in parts.items()}
        supers = {"super_scales": self.super_scales, "super_minimum": self.super_minimum}
        parts |= {name: tensor.contiguous() for name, tensor in supers.items() if tensor is not None}
        return Int4Weight(self._packed(bits), in_features=columns, group_size=size, codebook=self.levels, **parts)

    def _scale_dtype(self, numbers: Iterable[Tensor]) -> torch.dtype:
        """The least dtype of ours that holds these scales and minima exactly."""
        if self.super_scales is not None:
            return torch.int8
        return torch.float16 if all(map(_is_held_by_half, numbers)) else torch.float32

    def _packed(self, bits: int) -> Tensor:
        symmetric = self.minimum is None and self.levels is None
        offset, pad_code = (middle_code(bits) - self._middle, middle_code(bits)) if symmetric else (0, 0)
        if bits == 8 and not offset and isinstance(self.codes, Tensor):
            return pack(self.codes, pad_code, bits, copy=False)
        packed = torch.empty(self.shape[0], packed_columns(self.shape[1], bits), dtype=torch.uint8)
        for part, codes in self._panels():
            packed[part] = pack(codes + offset if offset else codes, pad_code, bits, copy=False)
        return packed

    def take_rows(self, order: Tensor) -> CodedMatrix:
        """The matrix whose row i is the row ``order[i]`` of this one, whose codes are a tensor."""
        assert isinstance(self.codes, Tensor)
        parts: dict[str, Any] = {name: part[:, order] for name, part in self._parts().items()}
        return replace(self, codes=self.codes[order], **parts)

    def take_columns(self, order: Tensor) -> CodedMatrix:
        """The matrix whose column i is the column ``order[i]`` of this one, whose codes are a tensor."""
        assert isinstance(self.codes, Tensor)
        one_level = self._one_level()
        return replace(one_level, codes=self.codes[:, order], groups=self.groups[order])

    def _one_level(self) -> CodedMatrix:
        """The same weights with scales in float32, which are exact, in place of two levels."""
        if self.super_scales is None:
            return self
        stretches = torch.arange(len(self.scales)) * self.group_size // SUPER_GROUP

        def product(numbers: Tensor, supers: Tensor) -> Tensor:
            return numbers.float() * supers.float()[stretches]

        minimum = None
        if self.minimum is not None and self.super_minimum is not None:
            minimum = product(self.minimum, self.super_minimum)
        scales = product(self.scales, self.super_scales)
        return replace(self, scales=scales, minimum=minimum, super_scales=None, super_minimum=None)

    def _parts(self) -> dict[str, Tensor]:
        """The numbers of each row: scales, minima, and their second level, as far as there are any."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    def decoded(self) -> Decoded:
        """The matrix where ``to_int4`` gives None."""
        return Decoded(self.decode(), self._what())

    def _what(self) -> str:
        if bool((self.groups[1:] < self.groups[:-1]).any()):
            return "codes in act-order, which desc_act=False or static groups would avoid"
        return f"codes in groups of {self.group_size}"

    def decode(self) -> Tensor:
        """The weights ``[N, K]`` in float32."""
        decoded = torch.empty(self.shape)
        for part, codes in self._panels():
            scales = self._numbers(self.scales, self.super_scales, part)
            levels = codes.float() if self.levels is None else self.levels[codes.long()]
            if self.minimum is not None:
                decoded[part] = levels * scales + self._numbers(self.minimum, self.super_minimum, part)
            else:
                decoded[part] = (levels - self._middle if self.levels is None else levels) * scales
        return decoded

    def _numbers(self, of_groups: Tensor, of_stretches: Tensor | None, rows: slice) -> Tensor:
        """The scale or the minimum of every column, ``[rows, K]`` float32."""
        numbers = of_groups[:, rows].float().t()[:, self.groups]
        if of_stretches is not None:
            numbers *= of_stretches[:, rows].float().t()[:, even_groups(len(self.groups), SUPER_GROUP)]
        return numbers

    def _our_form(self) -> tuple[int, int] | None:
        """The least width of ours that has the groups, and the group size.

        That is the matrix's own, or else the largest of ours whose groups each lie in one of the matrix's.
        """
        for bits in (4, 8)[self.bits > 4 : None if self.levels is None else 1]:
            for size in sorted(GROUP_SIZES_OF_BITS[bits], key=lambda size: (size != self.group_size, -size)):
                if torch.equal(self.groups[::size].repeat_interleave(size)[: len(self.groups)], self.groups):
                    return bits, size
        return None


def stack(matrices: Sequence[CodedMatrix]) -> CodedMatrix:
    """The rows of matrices below each other. They are of one kind: same columns, width of codes, groups and levels."""
    if len(matrices) == 1:
        return matrices[0]
    codes = [matrix.codes for matrix in matrices if isinstance(matrix.codes, Tensor)]
    assert len(codes) == len(matrices)
    parts = [matrix._parts() for matrix in matrices]
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return replace(matrices[0], codes=torch.cat(codes), **joined)


def is_sorted(order: Tensor) -> bool:
    """Whether ``order``, the numbers from 0 on, has them in their own order."""
    return not bool((order[1:] < order[:-1]).any())


def _is_held_by_half(numbers: Tensor) -> bool:
    return numbers.dtype == torch.float16 or torch.equal(numbers.float(), numbers.to(torch.float16).float())


def even_groups(columns: int, group_size: int) -> Tensor:
    """The group of each of ``columns`` columns, int64."""
    return torch.arange(columns) // group_size


def powers_of_two(exponents: Tensor) -> Tensor:
    """The float32 scales that MXFP4's bytes (E8M0) stand for: 2 to the power of the byte less 127.

    They are NaN above 252, where float32 cannot hold all values of a group, or 255 says so.
    """
    powers = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    return torch.where(exponents > 252, torch.nan, powers)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Unpacks fields of ``bits`` bits that follow each other from the lowest bit of the first byte on.

    Args:
        packed: ``[..., W]`` of an integer dtype.
        bits: 1 to 8.

    Returns:
        ``[..., F]`` uint8, with every field that begins in a row of ``packed``; the last may be no whole one.
    """
    data = packed.contiguous().view(torch.uint8)
    if bits == 4:
        return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    runs = torch.nn.functional.pad(data, (0, -data.shape[-1] % bits)).unflatten(-1, (-1, bits))
    fields = torch.empty(*runs.shape[:-1], 8, dtype=torch.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        field = runs[..., byte] >> shift
        if shift + bits > 8:
            field |= runs[..., byte + 1] << (8 - shift)
        fields[..., index] = field & (1 << bits) - 1
    return fields.flatten(-2)
