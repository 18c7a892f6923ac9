"""The operations by panels in plain torch: every device without Triton, and large M where a library's matmul wins.

A panel is a slice of the weight decoded into a small reused buffer, so no full weight ever exists. Panels are kept in
*plane order*: the low nibbles' columns of all its chunks, then the high nibbles'. Unpacking is then two
contiguous byte operations, and only the (much smaller) activations are permuted. The LoRA term rides along
as extra columns of the reduction: one matmul, one rounding.
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
    """Decodes panels of at most ``rows`` x ``chunks`` of one weight into its own reused buffers.

    ``extra_columns`` / ``extra_rows`` leave room right of / below the decoded panel for LoRA's factor.
    """

    def __init__(
        self,
        weight: Int4Weight,
        dtype: torch.dtype,
        rows: int,
        chunks: int,
        extra_columns: int = 0,
        extra_rows: int = 0,
    ) -> None:
        columns = chunks * CHUNK
        device = weight.device
        self.weight = weight
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.codes = torch.empty(rows * columns, dtype=torch.uint8, device=device)
        self.scratch = None if dtype == self.wide else torch.empty(rows * columns, dtype=self.wide, device=device)
        self.buffer = torch.empty((rows + extra_rows) * (columns + extra_columns), dtype=dtype, device=device)
        self.extra_columns, self.extra_rows = extra_columns, extra_rows

    def _per_run(self, values: Tensor, groups: Tensor, start: int, stop: int) -> Tensor:
        """Scales or minima as ``[rows, runs, 1]``."""
        return values[:, start:stop].index_select(0, groups).to(self.wide).t().contiguous().unsqueeze(-1)

    def __call__(self, start: int, stop: int, first_chunk: int, last_chunk: int) -> Tensor:
        """The panel of rows ``start:stop`` in plane order: ``[rows + extra_rows, columns + extra_columns]``.

        Only the decoded part is written. The tensor is valid until the next call.
        """
        rows, half = stop - start, (last_chunk - first_chunk) * RUN
        columns = 2 * half
        width = columns + self.extra_columns
        panel = self.buffer[: (rows + self.extra_rows) * width].view(-1, width)
        target = panel[:rows, :columns]
        wide = target if self.scratch is None else self.scratch[: rows * columns].view(rows, columns)

        packed = self.weight.packed[start:stop, first_chunk * RUN : last_chunk * RUN]
        codes = self.codes[: rows * columns].view(rows, columns)
        torch.bitwise_and(packed, 15, out=codes[:, :half])
        torch.bitwise_right_shift(packed, 4, out=codes[:, half:])
        if self.weight.codebook is not None:
            wide.copy_(self.weight.codebook.to(self.wide).index_select(0, codes.view(-1).int()).view(rows, columns))
        elif self.weight.minimum is not None:
            wide.copy_(codes)
        else:
            wide.copy_(codes.view(torch.int8).sub_(8))
        groups = _run_groups(first_chunk, last_chunk, self.weight.group_size, packed.device)
        runs = wide.unflatten(1, (-1, RUN))
        runs.mul_(self._per_run(self.weight.scales, groups, start, stop))
        if self.weight.minimum is not None:
            runs.add_(self._per_run(self.weight.minimum, groups, start, stop))
        if wide is not target:
            target.copy_(wide)
        return panel


def to_planes(x: Tensor, chunks: int, extra: Tensor | None = None) -> Tensor:
    """``[M, K]`` -> ``[M, chunks * 64 (+ R)]``: columns in plane order, zero-padded, ``extra`` appended."""
    columns = chunks * CHUNK
    width = columns + (0 if extra is None else extra.shape[1])
    planes = x.new_empty(x.shape[0], width)
    if x.shape[1] != columns:
        x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    planes[:, :columns].unflatten(1, (2, chunks, RUN)).copy_(x.unflatten(1, (chunks, 2, RUN)).transpose(1, 2))
    if extra is not None:
        planes[:, columns:] = extra
    return planes


def from_planes(planes: Tensor, out: Tensor) -> None:
    """``[M, chunks * 64]`` in plane order -> ``out`` ``[M, <= chunks * 64]`` in logical order."""
    logical = planes.unflatten(1, (2, -1, RUN)).transpose(1, 2).flatten(1)
    out.copy_(logical[:, : out.shape[1]])


def int4_matmul_panel(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, t: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """``Y = X·Wᵀ + bias + t·bᵀ``; shapes as ``reference.matmul``."""
    rows, chunks = weight.out_features, weight.packed.shape[1] // RUN
    y = x.new_empty(x.shape[0], rows)
    if y.numel() == 0:
        return y
    if b is None or t is None:
        t = b = None
    step = max(1, panel_elements(x.device) // max(1, chunks * CHUNK))
    decoder = PanelDecoder(weight, x.dtype, min(step, rows), chunks, extra_columns=0 if b is None else b.shape[1])
    planes = to_planes(x, chunks, None if t is None else t.to(x.dtype))
    bias = None if bias is None else bias.to(x.dtype)
    for start, stop in spans(rows, step):
        panel = decoder(start, stop, 0, chunks)
        if b is not None:
            panel[:, chunks * CHUNK :] = b[start:stop]
        if bias is None:
            torch.mm(planes, panel.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], planes, panel.t(), out=y[:, start:stop])
    return y


def int4_matmul_dx_panel(dy: Tensor, weight: Int4Weight, g: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """``dX = dY·W + g·a``; shapes as ``reference.matmul_dx``.

    Panels run along K, so every output is one reduction over N. Only where a single chunk of N rows outgrows a
    panel is N cut too; the partial sums are then added in float32 or wider.
    """
    rows, chunks = weight.out_features, weight.packed.shape[1] // RUN
    dx = dy.new_empty(dy.shape[0], weight.in_features)
    if dx.numel() == 0:
        return dx
    if g is None or a is None:
        g = a = None
    budget = panel_elements(dy.device)
    row_step = min(rows, max(1, budget // CHUNK))
    chunk_step = max(1, budget // (CHUNK * max(1, row_step)))
    extra = 0 if a is None else a.shape[0]
    decoder = PanelDecoder(weight, dy.dtype, row_step, min(chunk_step, chunks), extra_rows=extra)
    a_planes = None if a is None else to_planes(a.to(dy.dtype), chunks).unflatten(1, (2, chunks, RUN))
    dy_last = dy if g is None else torch.cat((dy[:, (rows - 1) // row_step * row_step :], g.to(dy.dtype)), dim=1)
    row_spans = list(spans(rows, row_step))
    for first, last in spans(chunks, chunk_step):
        total: Tensor | None = None
        for start, stop in row_spans:
            panel = decoder(start, stop, first, last)
            if stop < rows:
                part = dy[:, start:stop] @ panel[: stop - start]
            else:
                if a_planes is not None:
                    panel[stop - start :].unflatten(1, (2, -1, RUN)).copy_(a_planes[:, :, first:last])
                part = (dy_last if len(row_spans) == 1 or g is not None else dy[:, start:stop]) @ panel
            if len(row_spans) > 1:
                part = part.to(decoder.wide)
            total = part if total is None else total.add_(part)
        assert total is not None
        from_planes(total, dx[:, first * CHUNK : last * CHUNK])
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
        from_planes(decoder(start, stop, 0, chunks), out[start:stop])
    return out.view(*ids.shape, weight.in_features)
