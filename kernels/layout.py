"""The only place that knows where a code lies: ``Int4Weight``, ``pack``, ``unpack``.

One copy serves both directions. K is cut into chunks of 64, and a K that is no multiple of 64 is padded. A chunk's
first 32 columns are its low plane, the others its high plane, and kernels decode it plane by plane.

With 4 bits a chunk takes 32 bytes. Byte ``j`` holds ``code[k0 + j]`` in its low nibble and ``code[k0 + 32 + j]`` in its
high nibble, so a run of 32 bytes decodes into two runs of 32 neighbouring columns. With 8 bits a chunk takes 64 bytes,
a byte for each column, in order. The width of the packed rows tells which it is.

A run of 32 columns lies within one group for group sizes of 32, 64 and 128, so it has one scale. Codes of 8 bits may
also have groups of 16. Where scales are bytes, 256 columns share a super scale, whatever the group size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .names import GROUP_SIZES_OF_BITS, Form, Scheme

LAYOUT = "planar64-v1"
CHUNK = 64
RUN = CHUNK // 2
SCALE_DTYPES = (torch.float16, torch.float32)
SUPER_GROUP = 256  # columns that share a super scale


def padded(in_features: int) -> int:
    """K rounded up to whole chunks of 64."""
    return -(-in_features // CHUNK) * CHUNK


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups that cover the padded K, which ``scales`` has a row for. The last one may be partial."""
    return -(-padded(in_features) // group_size)


def super_count(in_features: int) -> int:
    """Number of stretches of 256 columns, which ``super_scales`` has a row for. The last one may be partial."""
    return -(-in_features // SUPER_GROUP)


def packed_columns(in_features: int, bits: int = 4) -> int:
    """Bytes of a packed row of K codes."""
    return padded(in_features) * bits // 8


def pack(codes: Tensor, pad_code: int = 0, bits: int = 4, copy: bool = True) -> Tensor:
    """Packs codes, one per byte, into rows of bytes.

    Args:
        codes: ``[N, K]`` uint8, values 0..15, or 0..255 with 8 bits.
        pad_code: the code that fills K up to a multiple of 64.
        bits: 4 or 8.
        copy: if false, codes of 8 bits that need no padding may be returned as they are.

    Returns:
        ``[N, packed_columns(K, bits)]`` uint8.

    Raises:
        ValueError: codes are no uint8 matrix, or one is above 15 with 4 bits.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be a 2-D uint8 tensor, got {codes.dim()}-D {codes.dtype}")
    if bits == 4 and codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes must lie in 0..15, got {int(codes.max())}")
    columns = codes.shape[1]
    if copy or padded(columns) > columns:
        codes = torch.nn.functional.pad(codes, (0, padded(columns) - columns), value=pad_code)
    if bits == 8:
        return codes.contiguous()
    low, high = codes.unflatten(1, (-1, 2, RUN)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Inverts ``pack``: ``[N, packed_columns(K, bits)]`` uint8 -> ``[N, K]`` uint8, one code per byte."""
    if packed.shape[1] == packed_columns(in_features, 8):
        return packed[:, :in_features]
    runs = packed.unflatten(1, (-1, RUN))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1)[:, :in_features]


def middle_code(bits: int) -> int:
    """The code that is 0 in the symmetric scheme: 8, or 128 with 8 bits."""
    return 1 << (bits - 1)


def tensor_shapes(
    rows: int, columns: int, form: Form, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtypes and shapes of the tensors of a weight ``[rows, columns]``, by the attributes of ``Int4Weight``.

    ``scale_dtype``: float16 or float32, or int8 for scales of two levels.
    """
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "packed": (torch.uint8, (rows, packed_columns(columns, form.bits)))
    }
    for name in ("scales", "minimum") if form.scheme == "affine" else ("scales",):
        shapes[name] = scale_dtype, (group_count(columns, form.group_size), rows)
        if scale_dtype == torch.int8:
            shapes[f"super_{name}"] = torch.float16, (super_count(columns), rows)
    if form.scheme == "codebook":
        shapes["codebook"] = torch.float32, (16,)
    return shapes


def float_values(values: Tensor, supers: Tensor | None, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored scales or minima ``[groups, N]`` in ``dtype``, float32 or wider, which holds them exactly.

    ``supers``: what belongs to them for each 256 columns, if they are bytes.
    """
    values = values.to(dtype)
    if supers is None:
        return values
    group = torch.arange(len(values), device=values.device)
    return values * supers.to(dtype).index_select(0, group * group_size // SUPER_GROUP)


def _check_group_size(group_size: int, bits: int) -> None:
    allowed = GROUP_SIZES_OF_BITS[bits]
    if group_size not in allowed:
        raise ValueError(f"group_size must be one of {allowed}, got {group_size} for codes of {bits} bits")


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A logical matrix ``W[N, K]`` (out, in) of codes of 4 bits, or of 8.

    ========== =============================================
    scheme     decoded weight
    ========== =============================================
    symmetric  ``(code - 8) * scales[k // G, n]``, with 8 bits ``(code - 128) * ...``
    affine     ``code * scales[k // G, n] + minimum[k // G, n]``
    codebook   ``codebook[code] * scales[k // G, n]``, of 4 bits only
    ========== =============================================

    Scales and minima are float16 or float32, or they have two levels: a byte for each group and a float16 number for
    each 256 columns. Their product in float32 is the scale or the minimum, and needs no rounding.

    Attributes:
        packed: ``[N, packed_columns(K, bits)]`` uint8, in the order that the module's docstring gives.
        scales: ``[ceil(padded(K) / G), N]`` float16, float32 or int8; may be negative.
        in_features: K.
        group_size: G, one of 32, 64, 128; with 8 bits also 16.
        minimum: of the shape and dtypes of ``scales``; present for the affine scheme only.
        codebook: ``[16]`` float32; present for the codebook scheme only.
        super_scales: ``[ceil(K / 256), N]`` float16; present where ``scales`` are int8.
        super_minimum: likewise for ``minimum``.

    Raises:
        ValueError: shapes, dtypes or the group size do not fit together.
    """

    packed: Tensor
    scales: Tensor
    in_features: int
    group_size: int
    minimum: Tensor | None = None
    codebook: Tensor | None = None
    super_scales: Tensor | None = None
    super_minimum: Tensor | None = None

    def __post_init__(self) -> None:
        if self.packed.dtype != torch.uint8 or self.packed.dim() != 2:
            raise ValueError(f"packed must be 2-D uint8, got {self.packed.dim()}-D {self.packed.dtype}")
        widths = {bits: packed_columns(self.in_features, bits) for bits in GROUP_SIZES_OF_BITS}
        if self.packed.shape[1] not in widths.values():
            raise ValueError(
                f"packed must have {widths[4]} columns (4 bits) or {widths[8]} (8 bits) for "
                f"in_features={self.in_features}, got {self.packed.shape[1]}"
            )
        _check_group_size(self.group_size, self.bits)
        if self.minimum is not None and self.codebook is not None:
            raise ValueError("a weight has a minimum (affine) or a codebook, not both")
        self._check_scales("scales", self.scales, self.super_scales)
        self._check_scales("minimum", self.minimum, self.super_minimum)
        if self.minimum is not None and self.two_level != (self.super_minimum is not None):
            raise ValueError("scales and minimum must both have two levels, or neither")
        if self.codebook is not None and self.bits != 4:
            raise ValueError(f"a codebook is for codes of 4 bits, these have {self.bits}")
        if self.codebook is not None and (self.codebook.shape != (16,) or self.codebook.dtype != torch.float32):
            raise ValueError(
                f"codebook must be float32 of shape (16,), got {self.codebook.dtype} {self.codebook.shape}"
            )

    def _check_scales(self, name: str, values: Tensor | None, supers: Tensor | None) -> None:
        """Checks ``scales`` or ``minimum``, and what belongs to it."""
        if values is None:
            if supers is not None:
                raise ValueError(f"super_{name} needs a {name}")
            return
        shape = (group_count(self.in_features, self.group_size), self.out_features)
        if tuple(values.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
        if supers is None:
            if values.dtype not in SCALE_DTYPES:
                wanted = "float16 or float32, or int8 with super_" + name
                raise ValueError(f"{name} must be {wanted}, got {values.dtype}")
            return
        if values.dtype != torch.int8:
            raise ValueError(f"{name} must be int8 beside super_{name}, got {values.dtype}")
        shape = (super_count(self.in_features), self.out_features)
        if tuple(supers.shape) != shape or supers.dtype != torch.float16:
            raise ValueError(f"super_{name} must be float16 of shape {shape}, got {supers.dtype} {tuple(supers.shape)}")

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        group_size: int,
        minimum: Tensor | None = None,
        codebook: Tensor | None = None,
        bits: int = 4,
        copy: bool = True,
        super_scales: Tensor | None = None,
        super_minimum: Tensor | None = None,
    ) -> Int4Weight:
        """Packs ``codes`` ``[N, K]`` of 4 or 8 bits with ``scales`` (and ``minimum``) of shape ``[ceil(K / G), N]``.

        Padded columns decode to zero in the symmetric scheme. In the other schemes their value has no meaning, and no
        operation reads it. ``copy``: see ``pack``.
        """
        _check_group_size(group_size, bits)
        # Checked before padding, which would hide missing or surplus groups.
        groups = -(-codes.shape[1] // group_size)
        for name, tensor in (("scales", scales), ("minimum", minimum)):
            if tensor is not None and tuple(tensor.shape) != (groups, codes.shape[0]):
                raise ValueError(f"{name} must have shape {(groups, codes.shape[0])}, got {tuple(tensor.shape)}")
        pad = (0, 0, 0, group_count(codes.shape[1], group_size) - groups)
        return cls(
            packed=pack(codes, 0 if minimum is not None or codebook is not None else middle_code(bits), bits, copy),
            scales=torch.nn.functional.pad(scales, pad).contiguous(),
            in_features=codes.shape[1],
            group_size=group_size,
            minimum=None if minimum is None else torch.nn.functional.pad(minimum, pad).contiguous(),
            codebook=codebook,
            super_scales=None if super_scales is None else super_scales.contiguous(),
            super_minimum=None if super_minimum is None else super_minimum.contiguous(),
        )

    @property
    def bits(self) -> int:
        """The width of a code: 4 or 8."""
        return 8 if self.packed.shape[1] == packed_columns(self.in_features, 8) else 4

    @property
    def chunks(self) -> int:
        """Chunks of 64 columns, padding included."""
        return padded(self.in_features) // CHUNK

    @property
    def scheme(self) -> Scheme:
        if self.codebook is not None:
            return "codebook"
        return "symmetric" if self.minimum is None else "affine"

    @property
    def two_level(self) -> bool:
        """Whether scales are bytes, with a super scale for each 256 columns."""
        return self.super_scales is not None

    @property
    def form(self) -> Form:
        return Form(self.scheme, self.group_size, self.bits)

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The logical ``(N, K)``."""
        return self.packed.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by attribute name."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def float_scales(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales of all groups in ``dtype``, float32 or wider, which holds them exactly: ``[groups, N]``."""
        return float_values(self.scales, self.super_scales, self.group_size, dtype)

    def float_minimum(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The minima of all groups, likewise; None but for the affine scheme."""
        if self.minimum is None:
            return None
        return float_values(self.minimum, self.super_minimum, self.group_size, dtype)

    def to(self, device: torch.device | str, copy: bool = False) -> Int4Weight:
        """The weight on ``device``; itself where it is there already, unless ``copy``."""
        return replace(self, **{name: tensor.to(device, copy=copy) for name, tensor in self.tensors().items()})

    def _of_rows(self, choose: Callable[[Tensor, int], Tensor]) -> Int4Weight:
        """The weight whose tensors are what ``choose`` takes from them, given the axis that output rows lie along."""
        parts = {name: (tensor, 0 if name == "packed" else 1) for name, tensor in self.tensors().items()}
        parts.pop("codebook", None)
        return replace(self, **{name: choose(*part) for name, part in parts.items()})

    def rows(self, start: int, stop: int) -> Int4Weight:
        """Output rows ``start:stop`` as a view."""
        return self._of_rows(lambda tensor, axis: tensor[start:stop] if axis == 0 else tensor[:, start:stop])

    def gather(self, ids: Tensor) -> Int4Weight:
        """A copy of the output rows ``ids`` (int64, ``[T]``), in that order. It is exact: groups lie along K."""
        return self._of_rows(lambda tensor, axis: tensor.index_select(axis, ids))

    @property
    def column_step(self) -> int:
        """Columns that a view begins at a multiple of: whole chunks and groups, and with two levels 256 columns."""
        return SUPER_GROUP if self.two_level else max(CHUNK, self.group_size)

    def columns(self, start: int, stop: int) -> Int4Weight:
        """Input columns ``start:stop`` as a view; ``start`` a multiple of ``column_step``."""
        if start % self.column_step:
            raise ValueError(f"columns must start at a multiple of {self.column_step}, got {start}")
        stop = min(stop, self.in_features)
        width = stop - start

        def part(values: Tensor, size: int, count: int) -> Tensor:
            return values[start // size : start // size + count]

        parts = {"packed": self.packed.narrow(1, start * self.bits // 8, packed_columns(width, self.bits))}
        for name, tensor in self.tensors().items():
            if name in ("scales", "minimum"):
                parts[name] = part(tensor, self.group_size, group_count(width, self.group_size))
            elif name.startswith("super_"):
                parts[name] = part(tensor, SUPER_GROUP, super_count(width))
        return replace(self, in_features=width, **parts)  # type: ignore[arg-type]


# Names of the attributes that are tensors.
TENSORS = tuple(field.name for field in fields(Int4Weight) if field.name not in ("in_features", "group_size"))
