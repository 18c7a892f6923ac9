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

# How a float matrix is quantized where nobody asks for anything, by the width of its codes. docs/decisions.md has the
# figures that chose them.
DEFAULT_FORMS = {4: Form("codebook", 32), 8: Form("symmetric", 64, 8)}
DEFAULT_FORM = DEFAULT_FORMS[4]


def fill_form(
    scheme: Scheme | None = None, group_size: int | None = None, bits: int | None = None, default: Form = DEFAULT_FORM
) -> Form:
    """The form that is asked for. What is None is as in ``default``, or as in the default of the width asked for."""
    if bits is None:
        bits = 4 if scheme == "codebook" else default.bits
    if bits != default.bits:
        default = DEFAULT_FORMS.get(bits, default)
    size = default.group_size if group_size is None else group_size
    return Form(default.scheme if scheme is None else scheme, size, bits)


Backend = Literal["auto", "triton", "panel"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FloatName = Literal["float32", "bfloat16", "float16"]
FLOAT_NAMES: tuple[FloatName, ...] = get_args(FloatName)
