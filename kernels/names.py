"""The names users choose by: forms of a matrix, backends, dtypes. Imports nothing, so that parsing is quick."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Scheme = Literal["symmetric", "affine", "codebook"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
BITS = (4, 8)  # of a code
GROUP_SIZES = (32, 64, 128)
GROUP_SIZES_OF_BITS = {4: GROUP_SIZES, 8: (16, *GROUP_SIZES)}


class Form(NamedTuple):
    """How a matrix is stored: how codes become weights, columns per scale, and bits per code."""

    scheme: Scheme
    group_size: int
    bits: int = 4

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.scheme}, groups of {self.group_size}"


# All that go together: a codebook has 16 levels.
FORMS = tuple(
    Form(scheme, size, bits)
    for bits, sizes in GROUP_SIZES_OF_BITS.items()
    for scheme in SCHEMES
    for size in sizes
    if (scheme, bits) != ("codebook", 8)
)

Backend = Literal["auto", "triton", "panel"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FloatName = Literal["float32", "bfloat16", "float16"]
FLOAT_NAMES: tuple[FloatName, ...] = get_args(FloatName)
