"""The operations by panels in plain torch: every device without Triton, and large M where a library's matmul wins.

A panel is a slice of the weight decoded into a small reused buffer, so no full weight ever exists. Panels are kept in
*plane order*: the low nibbles' columns of all its chunks, then the high nibbles'. Unpacking is then two
contiguous byte operations, and only the (much smaller) activations are permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .layout import CHUNK, RUN, Int4Weight

# Elements of one panel: on a GPU 16 MiB of 16-bit weights, which stay in a large L2; on a CPU 4 MiB of float32.
PANEL_ELEMENTS = {"cpu": 1 << 20}
PANEL_ELEMENTS_DEFAULT = 1 << 23


def panel_elements(device: torch.device) -> int:
    return PANEL_ELEMENTS.get(device.type, PANEL_ELEMENTS_DEFAULT)


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``(start, stop)`` of at most ``step`` that cover ``length``."""
    return ((start, min(start + step, length)) for start in range(0, length, step))


@lru_cache(maxsize=256)
def _run_groups(first_chunk: int, last_chunk: int, group_size: int, device: torch.device) -> Tensor:
    """The group of every run of 32 columns, in plane order."""
    low = torch.arange(first_chunk, last_chunk) * CHUNK
    return (torch.cat((low, low + RUN)) // group_size).to(device)


class PanelDecoder:
    """Decodes panels of at most ``rows`` x ``chunks`` of one weight into its own reused buffers."""

    def __init__(self, weight: Int4Weight, dtype: torch.dtype, rows: int, chunks: int) -> None:
        size = rows * chunks * CHUNK
        device = weight.device
        self.weight = weight
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.codes = torch.empty(size, dtype=torch.uint8, device=device)
        self.values = torch.empty(size, dtype=self.wide, device=device)
        self.rounded = None if dtype == self.wide else torch.empty(size, dtype=dtype, device=device)

    def _per_run(self, values: Tensor, groups: Tensor, start: int, stop: int) -> Tensor:
        """Scales or minima as ``[rows, runs, 1]``."""
        chosen = values[:, start:stop].index_select(0, groups).t()
        return torch.empty(chosen.shape, dtype=self.wide, device=values.device).copy_(chosen).unsqueeze(-1)

    def __call__(self, start: int, stop: int, first_chunk: int, last_chunk: int) -> Tensor:
        """The panel of rows ``start:stop`` in plane order, ``[rows, columns]``, valid until the next call."""
        rows, half = stop - start, (last_chunk - first_chunk) * RUN
        wide = self.values[: rows * 2 * half].view(rows, -1)
        packed = self.weight.packed[start:stop, first_chunk * RUN : last_chunk * RUN]
        codes = self.codes[: wide.numel()].view(rows, -1)
        torch.bitwise_and(packed, 15, out=codes[:, :half])
        torch.bitwise_right_shift(packed, 4, out=codes[:, half:])
        if self.weight.codebook is not None:
            wide.copy_(self.weight.codebook.to(self.wide).index_select(0, codes.view(-1).int()).view(rows, -1))
        elif self.weight.minimum is not None:
            wide.copy_(codes)
        else:
            wide.copy_(codes.view(torch.int8).sub_(8))
        groups = _run_groups(first_chunk, last_chunk, self.weight.group_size, packed.device)
        runs = wide.unflatten(1, (-1, RUN))
        runs.mul_(self._per_run(self.weight.scales, groups, start, stop))
        if self.weight.minimum is not None:
            runs.add_(self._per_run(self.weight.minimum, groups, start, stop))
        return wide if self.rounded is None else self.rounded[: wide.numel()].view(rows, -1).copy_(wide)


def to_planes(x: Tensor, chunks: int) -> Tensor:
    """``[M, K]`` -> ``[M, chunks * 64]``: zero-padded, columns in plane order."""
    if x.shape[1] != chunks * CHUNK:
        x = torch.nn.functional.pad(x, (0, chunks * CHUNK - x.shape[1]))
    return x.unflatten(1, (chunks, 2, RUN)).transpose(1, 2).flatten(1)


def from_planes(planes: Tensor) -> Tensor:
    """``[M, chunks * 64]`` in plane order -> the same in logical order."""
    return planes.unflatten(1, (2, -1, RUN)).transpose(1, 2).flatten(1)


def int4_matmul_panel(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, t: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """``Y = X·Wᵀ + bias + t·bᵀ``; shapes as ``reference.matmul``."""
    rows, chunks = weight.out_features, weight.packed.shape[1] // RUN
    if t is not None and b is not None:
        t, b = t.to(x.dtype), b.to(x.dtype)
        y = t @ b.t() if bias is None else torch.addmm(bias.to(x.dtype), t, b.t())
    else:
        y = x.new_zeros(x.shape[0], rows) if bias is None else bias.to(x.dtype).repeat(x.shape[0], 1)
    if y.numel() == 0:
        return y
    step = max(1, panel_elements(x.device) // max(1, chunks * CHUNK))
    decoder = PanelDecoder(weight, x.dtype, min(step, rows), chunks)
    planes = to_planes(x, chunks)
    for start, stop in spans(rows, step):
        y[:, start:stop].addmm_(planes, decoder(start, stop, 0, chunks).t())
    return y


def int4_matmul_dx_panel(dy: Tensor, weight: Int4Weight, g: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """``dX = dY·W + g·a``; shapes as ``reference.matmul_dx``.

    Panels run along K, so every output is one reduction over N. Only where a single chunk of N rows outgrows a
    panel is N cut too, and all is then computed in float32 or wider.
    """
    rows, chunks = weight.out_features, weight.packed.shape[1] // RUN
    dx = dy.new_zeros(dy.shape[0], weight.in_features)
    if dx.numel() == 0:
        return dx
    budget = panel_elements(dy.device)
    row_step = max(1, min(rows, budget // CHUNK))
    chunk_step = min(chunks, max(1, budget // (CHUNK * row_step)))
    # Partial sums that were rounded one by one would be less exact than one reduction is.
    work = dy.dtype if row_step >= rows else torch.promote_types(dy.dtype, torch.float32)
    decoder = PanelDecoder(weight, work, row_step, chunk_step)
    if g is not None and a is not None:
        g = g.to(dy.dtype).to(work)
        a = torch.nn.functional.pad(a.to(dy.dtype).to(work), (0, chunks * CHUNK - weight.in_features))
    for first, last in spans(chunks, chunk_step):
        columns = slice(first * CHUNK, last * CHUNK)
        if g is not None and a is not None:
            total = g @ to_planes(a[:, columns], last - first)
        else:
            total = dy.new_zeros(dy.shape[0], (last - first) * CHUNK, dtype=work)
        for start, stop in spans(rows, row_step):
            total.addmm_(dy[:, start:stop].to(work), decoder(start, stop, first, last))
        dx[:, columns] = from_planes(total)[:, : dx.shape[1] - columns.start]
    return dx


def int4_embedding_panel(ids: Tensor, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` of the table: ``[*ids.shape, K]``. Only the rows asked for are touched."""
    flat = ids.reshape(-1)
    picked = Int4Weight(
        packed=weight.packed.index_select(0, flat),
        scales=weight.scales.index_select(1, flat),
        in_features=weight.in_features,
        group_size=weight.group_size,
        minimum=None if weight.minimum is None else weight.minimum.index_select(1, flat),
        codebook=weight.codebook,
    )
    out = torch.empty(flat.shape[0], weight.in_features, dtype=dtype, device=weight.device)
    chunks = weight.packed.shape[1] // RUN
    step = max(1, panel_elements(weight.device) // max(1, chunks * CHUNK))
    decoder = PanelDecoder(picked, dtype, min(step, flat.shape[0]), chunks)
    for start, stop in spans(flat.shape[0], step):
        out[start:stop] = from_planes(decoder(start, stop, 0, chunks))[:, : weight.in_features]
    return out.view(*ids.shape, weight.in_features)
