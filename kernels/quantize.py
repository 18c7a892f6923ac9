"""Quantizes a float matrix to ``Int4Weight``, some rows at a time: fits the groups' scales, then rounds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .compensation import compensated_rows
from .group_fit import NF4, power_of_two
from .layout import SCALE_DTYPES, Int4Weight, tensor_shapes
from .names import BITS, GROUP_SIZES_OF_BITS, SCHEMES, Form, Scheme
from .scales import fit_scales

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Result = TypeVar("Result")
STORED_SCALES = (*SCALE_DTYPES, torch.int8)
CHUNK_ELEMENTS = 1 << 18  # 1 MiB in float32: the temporaries of the search stay in cache
COMPENSATED_ELEMENTS = 1 << 22  # rounding column by column takes longer with fewer rows at a time


def quantize_matrix(
    weight: Tensor,
    scheme: Scheme = "symmetric",
    group_size: int = 64,
    scale_search: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    bits: int = 4,
    importance: Tensor | None = None,
    factor: Tensor | None = None,
    release: Callable[[Tensor], None] | None = None,
) -> tuple[Int4Weight, float]:
    """Quantizes ``weight`` ``[N, K]``, a chunk of rows at a time.

    Args:
        weight: float16, bfloat16 or float32.
        scheme: "symmetric", "affine" or "codebook" (NF4).
        group_size: 32, 64 or 128; with 8 bits also 16.
        scale_search: if false, the scale is absmax / 7 (symmetric; 127 with 8 bits), the range / 15 (affine; 255) or
            absmax (codebook).
        scale_dtype: float16, float32, or int8 for scales of two levels. A matrix whose scales float16 cannot hold takes
            float32.
        bits: the width of a code, 4 or 8. The codebook scheme has 4.
        importance: ``[K]`` float32, finite, at least 0: the search counts the squared error of a column that many
            times. It is the mean square of the column's input, where that is known. A group of zeros counts evenly.
        factor: ``[K, K]`` float32, see ``compensation``: each column makes up for the errors of those on its left.
        release: called with some rows of ``weight`` each time these were read, so that the pages of a mapped file can
            be given back. The matrix is read twice.

    Returns:
        The packed weight, and its error ``||decoded - weight|| / ||weight||`` (0 for a matrix of zeros), in which all
        columns count the same.

    Raises:
        ValueError: an argument does not fit, or a weight is not finite.
    """
    form, weight = Form(scheme, group_size, bits), weight.detach()
    _check(weight, form, scale_dtype, importance, factor)
    peaks = _row_peaks(weight, release)
    scale_dtype = _holding_dtype(peaks, scale_dtype)
    whole = _empty(weight, form, scale_dtype)

    def quantize_chunk(start: int, rows: Tensor) -> tuple[float, float]:
        """Quantizes some rows; returns the squares of their error and of themselves."""
        if factor is None:
            part, decoded = _quantize_rows(rows, form, scale_search, scale_dtype, importance)
        else:
            part, decoded = compensated_rows(rows, form, scale_search, scale_dtype, importance, factor)
        target = whole.rows(start, start + len(rows)).tensors()
        for name in target.keys() - {"codebook"}:
            target[name].copy_(part.tensors()[name])
        # In units of the row no square under- or overflows.
        unit = power_of_two(peaks[start : start + len(rows), None])
        error = _squares(decoded.sub_(rows).div_(unit), unit)
        return error, _squares(torch.div(rows, unit, out=decoded), unit)

    elements = CHUNK_ELEMENTS if factor is None else COMPENSATED_ELEMENTS
    errors, totals = zip(*_each_chunk(weight, quantize_chunk, elements, release), strict=True)
    return whole, (sum(errors) / sum(totals)) ** 0.5 if any(totals) else 0.0


def check_form(scheme: object, group_size: object, bits: object = 4) -> None:
    """Raises ValueError where there is no such scheme, group size or width of codes, or they do not go together."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    if bits == 8 and scheme == "codebook":
        raise ValueError("the codebook scheme has 4 bits: choose symmetric or affine for 8")
    sizes = GROUP_SIZES_OF_BITS[bits]
    if type(group_size) is not int or group_size not in sizes:
        wider = "; it goes with 8 bits" if bits == 4 and group_size == 16 else ""
        raise ValueError(
            f"group_size must be one of {', '.join(map(str, sizes))}, got {group_size!r} for codes of {bits} bits"
            f"{wider}"
        )


def _check(
    weight: Tensor, form: Form, scale_dtype: torch.dtype, importance: Tensor | None, factor: Tensor | None
) -> None:
    check_form(*form)
    if scale_dtype not in STORED_SCALES:
        raise ValueError(f"scale_dtype must be one of {STORED_SCALES}, got {scale_dtype}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight must have a dtype of {WEIGHT_DTYPES}, got {weight.dtype}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be a matrix [N, K] that is not empty, got shape {tuple(weight.shape)}")
    pairs = 2 * tuple(weight.shape[1:])
    if factor is not None and (factor.shape != pairs or factor.dtype != torch.float32):
        raise ValueError(f"factor must be float32 of shape {pairs}, got {factor.dtype} of {tuple(factor.shape)}")
    if importance is None:
        return
    if importance.shape != weight.shape[1:] or importance.dtype != torch.float32:
        raise ValueError(
            f"importance must be float32 of shape {tuple(weight.shape[1:])}, a number for each column, "
            f"got {importance.dtype} of {tuple(importance.shape)}"
        )
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance must be finite and at least 0")


def _each_chunk(
    weight: Tensor,
    work: Callable[[int, Tensor], Result],
    elements: int,
    release: Callable[[Tensor], None] | None,
) -> list[Result]:
    """Calls ``work`` for some rows at a time, of ``elements`` weights: with the first one's number, and in float32.

    On a CPU, chunks are spread over as many threads as torch uses, and an operation uses one. Operations on a chunk are
    so short that to split each of them costs more than it gains, and many times as much where the cores are busy.
    """
    step = max(1, elements // weight.shape[1])
    starts, threads = range(0, weight.shape[0], step), torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def call(start: int) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            rows = weight[start : start + step]
            result = work(start, rows.to(torch.float32))
            if release is not None:
                release(rows)
            return result

    if weight.device.type != "cpu" or threads == 1:
        return [call(start) for start in starts]
    try:
        with ThreadPoolExecutor(min(threads, len(starts)), "mebp-quantize", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(call, starts))
    finally:
        # Threads that start later take over the last number that was set in any thread.
        torch.set_num_threads(threads)


def _row_peaks(weight: Tensor, release: Callable[[Tensor], None] | None) -> Tensor:
    """The largest magnitude of each row."""
    peaks = weight.new_empty(len(weight), dtype=torch.float32)

    def find(start: int, rows: Tensor) -> None:
        # What a chunk leaves behind must not be a tensor: it would lie in the space that the next chunk needs again.
        peaks[start : start + len(rows)] = torch.maximum(-rows.amin(1), rows.amax(1))

    _each_chunk(weight, find, CHUNK_ELEMENTS, release)
    broken = ~peaks.isfinite()
    if broken.any():
        raise ValueError(f"weight must be finite, got NaN or infinity in row {int(broken.nonzero()[0])}")
    return peaks


def _holding_dtype(row_peaks: Tensor, scale_dtype: torch.dtype) -> torch.dtype:
    """``scale_dtype``, or float32 if float16 overflows or leaves the scales of a whole row less than 5 bits.

    A group may be that small within a larger row. It may then decode to zero, which is no loss beside its row. The
    product of a byte and a super scale has the steps of the least float16 numbers too, so the bounds are the same.
    """
    too_small = (row_peaks > 0) & (row_peaks < 2.0**-16)
    return torch.float32 if bool(too_small.any() | (row_peaks > 2.0**15).any()) else scale_dtype


def _empty(weight: Tensor, form: Form, scale_dtype: torch.dtype) -> Int4Weight:
    shapes = tensor_shapes(*weight.shape, form, scale_dtype)
    parts = {name: weight.new_empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    if "codebook" in parts:
        parts["codebook"] = NF4.to(weight.device)
    return Int4Weight(in_features=weight.shape[1], group_size=form.group_size, **parts)


def _quantize_rows(
    rows: Tensor, form: Form, scale_search: bool, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Int4Weight, Tensor]:
    """The weight of some rows, and what it decodes to."""
    scales = fit_scales(rows, form, scale_dtype, importance, scale_search)
    codes, decoded = scales.round(rows)
    return scales.weight(codes), decoded


def _squares(values: Tensor, unit: Tensor) -> float:
    """The sum of squares of rows that are in units of ``unit``. Overwrites them."""
    return float((values.square_().sum(1, keepdim=True).double() * unit.double().square()).sum())
