"""Fits the scales of a span of columns as they are stored, and rounds columns to codes by scales that are stored.

Both halves of quantization are here, so that what rounds column by column can use them as well:

```
scales = fit_scales(rows[:, start:stop], form, scale_dtype, importance[start:stop])
levels = scales.levels()                       # of all groups of the span
codes, decoded = levels.group(0).round(rows[:, start : start + 1])  # a column, or several, of its first group
```

A span begins at a multiple of the group size, and of 256 columns where the scales have two levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .group_fit import NF4, NF4_BOUNDS, REFITS, Groups
from .layout import SUPER_GROUP, Int4Weight, float_values, middle_code
from .names import Form

BYTE_PEAK = 127.0
HALF_OF_LEAST_FLOAT16 = 2.0**-25


class Levels(NamedTuple):
    """The levels of groups: float32 scales (and minima) ``[N, groups, 1]``, or ``[N, 1]`` of one group."""

    form: Form
    scale: Tensor
    minimum: Tensor | None

    def group(self, index: int) -> Levels:
        """The levels of one group of each row, for columns ``[N, C]`` of it."""
        return Levels(self.form, self.scale[:, index], None if self.minimum is None else self.minimum[:, index])

    def groups(self, start: int, stop: int | None) -> Levels:
        """The levels of groups ``start:stop``."""
        minimum = None if self.minimum is None else self.minimum[:, start:stop]
        return Levels(self.form, self.scale[:, start:stop], minimum)

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes, uint8, and what they decode to, float32.

        Args:
            values: float32 ``[N, groups, C]``, or ``[N, C]`` of one group.
        """
        shifted = values if self.minimum is None else values - self.minimum
        # Every value of a group with scale 0 becomes level 0.
        ratio = shifted / torch.where(self.scale == 0, torch.inf, self.scale)
        if self.form.scheme == "codebook":
            indices = torch.bucketize(ratio, NF4_BOUNDS.to(ratio.device), out_int32=True)
            decoded = NF4.to(ratio.device).index_select(0, indices.flatten()).view(ratio.shape)
            return indices.to(torch.uint8), decoded.mul_(self.scale)
        if self.minimum is not None:
            ratio.round_().clamp_(0, 2**self.form.bits - 1)
            return ratio.to(torch.uint8), ratio.mul_(self.scale).add_(self.minimum)
        middle = middle_code(self.form.bits)
        ratio.round_().clamp_(-middle, middle - 1)
        return (ratio + middle).to(torch.uint8), ratio.mul_(self.scale)


@dataclass(frozen=True)
class Scales:
    """The scales of ``N`` rows over a span of columns, as ``Int4Weight`` stores them.

    Attributes:
        form: scheme, group size and width of codes.
        scales: ``[groups, N]``, float16, float32 or int8.
        minimum: likewise; affine only.
        super_scales, super_minimum: ``[stretches of 256 columns, N]`` float16, where ``scales`` are int8.
    """

    form: Form
    scales: Tensor
    minimum: Tensor | None = None
    super_scales: Tensor | None = None
    super_minimum: Tensor | None = None

    def levels(self) -> Levels:
        """The levels of all groups."""

        def wide(values: Tensor, supers: Tensor | None) -> Tensor:
            return float_values(values, supers, self.form.group_size).t().unsqueeze(-1)

        minimum = None if self.minimum is None else wide(self.minimum, self.super_minimum)
        return Levels(self.form, wide(self.scales, self.super_scales), minimum)

    @classmethod
    def joined(cls, spans: Sequence[Scales]) -> Scales:
        """The scales of neighbouring spans as those of one."""
        (form, *_), *tensors = ([getattr(span, field.name) for span in spans] for field in fields(cls))
        return cls(form, *(None if parts[0] is None else torch.cat(parts) for parts in tensors))

    def weight(self, codes: Tensor) -> Int4Weight:
        """The weight of ``codes`` ``[N, C]``, uint8, where the span is all columns of a matrix."""
        return Int4Weight.from_codes(
            codes,
            self.scales,
            self.form.group_size,
            self.minimum,
            codebook=NF4.to(codes.device) if self.form.scheme == "codebook" else None,
            bits=self.form.bits,
            super_scales=self.super_scales,
            super_minimum=self.super_minimum,
        )

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds the whole span ``[N, C]``, float32: the nearest codes, uint8, and what they decode to, float32."""
        levels = self.levels()
        parts = [levels.groups(first, last).round(part) for part, first, last in _in_groups(values, self.form)]
        codes, decoded = ([part[index].flatten(1) for part in parts] for index in (0, 1))
        return (codes[0], decoded[0]) if len(parts) == 1 else (torch.cat(codes, 1), torch.cat(decoded, 1))


def fit_scales(
    values: Tensor,
    form: Form,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
    search: bool = True,
) -> Scales:
    """Fits scales (and minima) to a span of columns.

    Args:
        values: ``[N, C]`` float32, finite. The span is fitted at once: its temporaries are some five times its size.
        form: scheme, group size and width of codes.
        scale_dtype: float16, float32, or int8 for two levels. The caller sees to it that they hold the scales.
        importance: ``[C]`` float32, at least 0: how much the squared error of each column counts, such as the mean
            square of its input. A group with zeros only is fitted as without it.
        search: if false, the scales spread the range of the codes over the range of each group's weights.
    """
    parts = []
    # A partial last group is fitted at its own size, because padding would take part in the fit.
    for part, first, last in _in_groups(values, form):
        weights = None if importance is None else _in_groups_of(importance, part, first * form.group_size)
        groups = Groups(part, form, weights)
        parts.append((groups, groups.search() if search else groups.plain(), slice(first, last)))
    scale = _storage([groups.scale_of(fit) for groups, fit, _ in parts], scale_dtype, form.group_size)
    scale = scale._replace(outward=form.scheme == "symmetric" and form.bits == 8)
    minimum = _storage([groups.minimum_of(fit) for groups, fit, _ in parts], scale_dtype, form.group_size)
    scales, minima = [], []
    for groups, fit, span in parts:
        of_scale, of_minimum = scale.groups(span), minimum.groups(span)
        fit = groups.refine(fit, of_scale.round, of_minimum.round, REFITS[form.bits] if search else 0)
        scales.append(of_scale.store(groups.scale_of(fit)))
        minima.append(of_minimum.store(groups.minimum_of(fit)))
    fitted = Scales(form, torch.cat(scales, 1).t(), super_scales=scale.super_rows)
    if form.scheme != "affine":
        return fitted
    return replace(fitted, minimum=torch.cat(minima, 1).t(), super_minimum=minimum.super_rows)


def _in_groups(values: Tensor, form: Form) -> Iterator[tuple[Tensor, int, int]]:
    """The full groups of a span ``[N, C]``, then its partial last one: ``[N, groups, size]`` and the groups' bounds."""
    size = form.group_size
    groups, rest = divmod(values.shape[1], size)
    if groups:
        yield values[:, : groups * size].unflatten(1, (groups, size)), 0, groups
    if rest:
        yield values[:, groups * size :].unsqueeze(1), groups, groups + 1


def _in_groups_of(importance: Tensor, part: Tensor, start: int) -> Tensor:
    """The importance ``[groups, size]`` of the columns of ``part``, which begin at ``start``."""
    shape = part.shape[1:]
    return importance[start : start + shape.numel()].view(shape)


class _Storage(NamedTuple):
    """How scales, or minima, are stored: a dtype, and for bytes the super scale of each group.

    Attributes:
        supers: ``[N, groups]`` float32.
        super_rows: what is stored of them, ``[stretches, N]`` float16.
        outward: whether a byte is rounded away from 0. With codes of 8 bits, to clip by half a byte costs more than a
            scale that is a whole byte too large.
    """

    dtype: torch.dtype
    supers: Tensor | None = None
    super_rows: Tensor | None = None
    outward: bool = False

    def groups(self, span: slice) -> _Storage:
        return self if self.supers is None else self._replace(supers=self.supers[:, span])

    def store(self, numbers: Tensor) -> Tensor:
        """``numbers`` ``[N, groups]`` as they are stored."""
        if self.supers is None:
            return numbers.to(self.dtype)
        steps = numbers / torch.where(self.supers == 0, torch.inf, self.supers)
        steps = torch.where(steps > 0, steps.ceil(), steps.floor()) if self.outward else steps.round()
        return steps.clamp_(-BYTE_PEAK, BYTE_PEAK).to(self.dtype)

    def round(self, numbers: Tensor) -> Tensor:
        """The float32 value of ``numbers`` ``[N, groups, 1]`` once they are stored."""
        stored = self.store(numbers.squeeze(-1)).float()
        return (stored if self.supers is None else stored * self.supers).unsqueeze(-1)


def _storage(parts: list[Tensor], dtype: torch.dtype, group_size: int) -> _Storage:
    """How to store scales or minima whose fits are ``parts``, each ``[N, groups]``.

    With bytes, the largest magnitude of each stretch of 256 columns becomes the byte 127.
    """
    if dtype != torch.int8:
        return _Storage(dtype)
    per_stretch = SUPER_GROUP // group_size
    peaks = torch.cat(parts, 1).abs()
    groups = peaks.shape[1]
    peaks = torch.nn.functional.pad(peaks, (0, -groups % per_stretch)).unflatten(1, (-1, per_stretch)).amax(-1)
    # Among the least numbers of float16 the step is coarse. Half a step more rounds up, so that no byte overflows.
    stored = (peaks / BYTE_PEAK + HALF_OF_LEAST_FLOAT16).to(torch.float16)
    stored = torch.where(peaks == 0, 0.0, stored).to(torch.float16)
    supers = stored.float().repeat_interleave(per_stretch, 1)[:, :groups]
    return _Storage(dtype, supers, stored.t())
