"""The form in which each matrix of a model is stored: the defaults, and what a user asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mebp_triton.convert.calibration.layer_inputs import Columns
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import BITS, DEFAULT_FORMS, GROUP_SIZES_OF_BITS, Form, Scheme, fill_form
from mebp_triton.kernels.quantize import check_form, quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.rounding import round_to_grid
from mebp_triton.models.skeleton import Role
from mebp_triton.system.memory import page_dropper

# Of a matrix that has other codes in the source than we hold. To round it to 4 bits once more would harm the model, and
# 8 bits hardly change it; see docs/decisions.md.
DECODED_FORM = DEFAULT_FORMS[8]
# Of an embedding and a head. They are read by rows: 8 bits cost space on disk and hardly any memory.
TABLE_FORM = DEFAULT_FORMS[8]
# The part of a change that may lie outside of a grid's levels. A small change of random weights has 1 to 4 % there. A
# change of many steps has more, needs other scales, and is not undone by the nearest codes.
MOST_OUTSIDE = 0.1
NOTHING_KNOWN = Columns()


def scale_dtype_of(form: Form) -> torch.dtype:
    """The dtype of scales in a store, int8 for two levels: these take less and lose hardly anything.

    Of two groups of 128, two levels take as much as float16. Codes of 8 bits leave little that smaller scales could
    save.
    """
    return torch.int8 if form.bits == 4 and form.group_size < 128 else torch.float16


def quantize_as(
    form: Form, matrix: Tensor, scale_search: bool = True, columns: Columns = NOTHING_KNOWN
) -> tuple[Int4Weight, float]:
    """Quantizes ``matrix`` ``[N, K]`` as a store has ``form``, and gives the pages of a mapped file back.

    Returns what ``quantize_matrix`` does. ``columns``: what is known of the matrix's columns.
    """
    return quantize_matrix(
        matrix,
        form.scheme,
        form.group_size,
        scale_search,
        scale_dtype_of(form),
        form.bits,
        release=page_dropper(matrix),
        **columns._asdict(),
    )


@dataclass(frozen=True)
class Recipe:
    """How matrices are quantized.

    Attributes:
        scheme, group_size, bits: what the user asked for of the linear layers, or None for what fits the source.
        scale_search: see ``quantize``.
        embedding_bits: the width of codes asked for of the embedding and the head; with 4, ``scheme`` and
            ``group_size`` hold for them too.
    """

    scheme: Scheme | None = None
    group_size: int | None = None
    scale_search: bool = True
    bits: int | None = None
    embedding_bits: int | None = None

    def __post_init__(self) -> None:
        check_form(*fill_form(self.scheme, self.group_size, self.bits))
        if self.embedding_bits is not None and (
            type(self.embedding_bits) is not int or self.embedding_bits not in BITS
        ):
            raise ValueError(f"embedding_bits must be one of {', '.join(map(str, BITS))}, got {self.embedding_bits!r}")

    def _asked(self, role: Role) -> tuple[Scheme | None, int | None, int | None]:
        if role in ("linear", "expert"):
            return self.scheme, self.group_size, self.bits
        if self.embedding_bits != 4:
            return None, None, self.embedding_bits
        return self.scheme, self.group_size if self.group_size in GROUP_SIZES_OF_BITS[4] else None, 4

    def form(self, default: Form, role: Role = "linear") -> Form:
        """The form of a matrix: as asked for, and otherwise as ``default``, as far as that goes together."""
        return fill_form(*self._asked(role), default)

    def takes(self, form: Form, role: Role = "linear") -> bool:
        """Whether ``form`` is as the user asked for."""
        return all(want in (None, has) for want, has in zip(self._asked(role), form, strict=True))

    def apply(
        self,
        value: Tensor | Int4Weight,
        default: Form | Int4Weight,
        role: Role = "linear",
        columns: Callable[[], Columns] = Columns,
    ) -> tuple[Int4Weight, float]:
        """The int4 weight of a matrix, and its relative error, which is 0 for codes taken over as they were.

        Args:
            value: the matrix ``[N, K]``.
            default: the form for what the user did not ask for; or a weight whose grid is kept where it will do.
            role: what the matrix is in the model.
            columns: tells what is known of the matrix's columns, if it is quantized anew.
        """
        if isinstance(value, Int4Weight):
            if self.takes(value.form, role):
                return value, 0.0
            value = decode(value, torch.float32)
        if isinstance(default, Int4Weight):
            if self.takes(default.form, role):
                rounded = round_to_grid(value, default)
                if rounded.outside <= MOST_OUTSIDE:
                    return rounded.weight, rounded.error
            default = default.form
        return quantize_as(self.form(default, role), value, self.scale_search, columns())
