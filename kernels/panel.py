"""The operations by panels, with torch's own products: for devices without Triton, and for large M.

On a CPU compiled code decodes the panels, or takes the whole operation, where there is some: see ``native``.

A panel is a slice of the weight, decoded into a small reused buffer, so no full weight ever exists. Panels are in
*plane order*: the columns of all low planes first, then those of all high planes. Unpacking 4 bits is then two
contiguous byte operations, and only the activations, which are much smaller, are permuted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .layout import CHUNK, RUN, SUPER_GROUP, Int4Weight, middle_code
from .native import decodes, native_decode, native_matmul, native_matmul_dx, takes
from .workspace import workspace

# Rows of a panel are a multiple of this, or fewer: a tile of the libraries' products. They have slower kernels for an
# output that begins elsewhere and so is misaligned.
TILE_ROWS = 128


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``(start, stop)`` of at most ``step`` that cover ``length``."""
    return ((start, min(start + step, length)) for start in range(0, length, step))


def whole_tiles(rows: int) -> int:
    """At least one row, and if there are enough, no more than whole tiles hold: 762 -> 640."""
    return max(1, rows if rows < TILE_ROWS else rows - rows % TILE_ROWS)


class PanelDecoder:
    """Decodes panels of one weight, of at most ``rows`` rows and ``chunks`` chunks of columns, into reused buffers.

    In plain torch, panels are in plane order. With ``by_kernel`` a Triton kernel decodes them, in logical order, as
    compiled code does on a CPU. ``arrange`` permutes what is multiplied with a panel into its order, and ``restore``
    permutes a product back.
    """

    def __init__(self, weight: Int4Weight, dtype: torch.dtype, rows: int, chunks: int, by_kernel: bool = False) -> None:
        size = rows * chunks * CHUNK
        device, memory = weight.device, workspace()
        self.weight, self.by_kernel = weight, by_kernel
        self.logical = by_kernel or decodes(weight, dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.rounded = None
        if self.logical or dtype != self.wide:
            self.rounded = memory.buffer("rounded", size, dtype, device)
        if not self.logical:
            self.codes = memory.buffer("codes", size, torch.uint8, device)
            self.values = memory.buffer("values", size, self.wide, device)
        self._groups: dict[tuple[int, int], Tensor] = {}

    @property
    def piece(self) -> int:
        """The most columns of a run that have one scale."""
        return min(RUN, self.weight.group_size)

    def with_weight(self, weight: Int4Weight) -> PanelDecoder:
        """A decoder of another weight that uses the same buffers."""
        other = copy.copy(self)
        other.weight, other._groups = weight, {}
        return other

    def arrange(self, x: Tensor, chunks: int) -> Tensor:
        """``[M, columns]`` -> ``[M, width]`` in the panel's order, width being that of a panel of ``chunks`` chunks."""
        return x if self.logical else to_planes(x, chunks)

    def restore(self, x: Tensor, columns: int) -> Tensor:
        """Inverts ``arrange``: ``[M, width]`` -> ``[M, columns]`` in logical order."""
        return (x if self.logical else from_planes(x))[:, :columns]

    def _piece_groups(self, first_chunk: int, last_chunk: int) -> Tensor:
        """The group of every piece of columns, in plane order: of a run, or of its halves where a group is one."""
        if (first_chunk, last_chunk) not in self._groups:
            first = torch.arange(first_chunk * CHUNK, last_chunk * CHUNK, self.piece, device=self.weight.device)
            planes = first.view(-1, 2, RUN // self.piece).transpose(0, 1)
            self._groups[first_chunk, last_chunk] = planes.flatten() // self.weight.group_size
        return self._groups[first_chunk, last_chunk]

    def _per_piece(self, values: Tensor, supers: Tensor | None, groups: Tensor, start: int, stop: int) -> Tensor:
        """Scales or minima of the rows ``start:stop``, one for each piece, as ``[rows, pieces, 1]``."""
        chosen = values[:, start:stop].index_select(0, groups)
        if supers is not None:
            # Multiplied as they lie, which takes half as long as after the transposition.
            stretches = groups * self.weight.group_size // SUPER_GROUP
            chosen = chosen.to(self.wide).mul_(supers[:, start:stop].to(self.wide).index_select(0, stretches))
        made = torch.empty(chosen.t().shape, dtype=self.wide, device=values.device).copy_(chosen.t())
        return made.unsqueeze(-1)

    def __call__(self, start: int, stop: int, first_chunk: int, last_chunk: int) -> Tensor:
        """The decoded panel of rows ``start:stop`` and some chunks, ``[rows, columns]``, valid until the next call."""
        if self.logical:
            return self._decode_in_order(start, stop, first_chunk * CHUNK, last_chunk * CHUNK)
        rows, half = stop - start, (last_chunk - first_chunk) * RUN
        wide = self.values[: rows * 2 * half].view(rows, -1)
        codes = self.codes[: wide.numel()].view(rows, -1)
        if self.weight.bits == 4:
            packed = self.weight.packed[start:stop, first_chunk * RUN : last_chunk * RUN]
            torch.bitwise_and(packed, 15, out=codes[:, :half])
            torch.bitwise_right_shift(packed, 4, out=codes[:, half:])
        else:
            chunks = self.weight.packed[start:stop, first_chunk * CHUNK : last_chunk * CHUNK].unflatten(1, (-1, 2, RUN))
            codes.unflatten(1, (2, -1, RUN)).copy_(chunks.transpose(1, 2))
        if self.weight.codebook is not None:
            wide.copy_(self.weight.codebook.to(self.wide).index_select(0, codes.view(-1).int()).view(rows, -1))
        elif self.weight.minimum is not None:
            wide.copy_(codes)
        else:
            wide.copy_(codes.sub_(middle_code(self.weight.bits)).view(torch.int8))  # a byte below 0 wraps as int8 does
        groups = self._piece_groups(first_chunk, last_chunk)
        pieces = wide.unflatten(1, (-1, self.piece))
        weight = self.weight
        pieces.mul_(self._per_piece(weight.scales, weight.super_scales, groups, start, stop))
        if weight.minimum is not None:
            pieces.add_(self._per_piece(weight.minimum, weight.super_minimum, groups, start, stop))
        return wide if self.rounded is None else self.rounded[: wide.numel()].view(rows, -1).copy_(wide)

    def _decode_in_order(self, start: int, stop: int, first: int, last: int) -> Tensor:
        part = self.weight.rows(start, stop).columns(first, last)
        assert self.rounded is not None
        out = self.rounded[: (stop - start) * part.in_features].view(part.shape)
        if not self.by_kernel:
            return native_decode(part, out)
        from .embedding import decode_rows_triton

        return decode_rows_triton(part, out)


def to_planes(x: Tensor, chunks: int) -> Tensor:
    """``[M, K]`` -> ``[M, chunks * 64]``, zero-padded, with columns in plane order."""
    if x.shape[1] != chunks * CHUNK:
        x = torch.nn.functional.pad(x, (0, chunks * CHUNK - x.shape[1]))
    return x.unflatten(1, (chunks, 2, RUN)).transpose(1, 2).flatten(1)


def from_planes(planes: Tensor) -> Tensor:
    """``[M, chunks * 64]`` in plane order -> the same columns in logical order."""
    return planes.unflatten(1, (2, -1, RUN)).transpose(1, 2).flatten(1)


def int4_matmul_panel(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
    by_kernel: bool = False,
    elements: int | None = None,
) -> Tensor:
    """Computes ``Y = X·Wᵀ + bias + t·bᵀ``: x ``[M, K]``, bias ``[N]``, t ``[M, R]``, b ``[N, R]``; returns ``[M, N]``.

    With ``by_kernel`` a Triton kernel decodes the panels. They have at most ``elements``, or those of the workspace.
    """
    if not by_kernel and takes(x):
        if bias is None and t is None and x.dtype == torch.float32:  # the short way, which many calls take for a token
            return native_matmul(x, ((weight, None, None, None),))[0]
        return int4_matmul_group_native(x, [weight], bias, t, b)[0]
    rows, chunks = weight.out_features, weight.chunks
    y = x.new_empty(x.shape[0], rows) if bias is None else bias.to(x.dtype).repeat(x.shape[0], 1)
    if y.numel() == 0:
        return y
    step = whole_tiles((elements or workspace().elements(x.device)) // max(1, chunks * CHUNK))
    decoder = PanelDecoder(weight, x.dtype, min(step, rows), chunks, by_kernel)
    planes = decoder.arrange(x, chunks)
    for start, stop in spans(rows, step):
        y[:, start:stop].addmm_(planes, decoder(start, stop, 0, chunks).t(), beta=0 if bias is None else 1)
    if t is not None and b is not None:
        y.addmm_(t.to(x.dtype), b.to(x.dtype).t())
    return y


def int4_matmul_group_native(
    x: Tensor, weights: Sequence[Int4Weight], bias: Tensor | None, t: Tensor | None, b: Tensor | None
) -> list[Tensor]:
    """Computes ``Y_i = X·W_iᵀ + bias_i + t_i·b_iᵀ`` by compiled code; ``native.takes`` holds for x.

    x ``[M, K]``, bias ``[sum N_i]``, t ``[M, members * R]``, b ``[sum N_i, R]``; returns ``[M, N_i]`` each.
    """
    dtype = x.dtype

    def wide(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == dtype == torch.float32 else tensor.to(dtype).float()

    biases, ts, bs = [[None] * len(weights)] * 3
    sizes = [weight.out_features for weight in weights]
    if bias is not None:
        biases = wide(bias).split(sizes)
    if t is not None and b is not None:
        ts, bs = wide(t).split(b.shape[1], dim=1), wide(b).split(sizes)
    ys = native_matmul(wide(x), list(zip(weights, biases, ts, bs, strict=True)))
    return ys if dtype == torch.float32 else [y.to(dtype) for y in ys]


def int4_matmul_dx_panel(
    dy: Tensor,
    weight: Int4Weight,
    g: Tensor | None = None,
    a: Tensor | None = None,
    by_kernel: bool = False,
    elements: int | None = None,
) -> Tensor:
    """Computes ``dX = dY·W + g·a``: dy ``[M, N]``, g ``[M, R]``, a ``[R, K]``; returns ``[M, K]``.

    ``by_kernel`` and ``elements`` are those of ``int4_matmul_panel``.
    """
    return int4_matmul_dx_group_panel([dy], [weight], g, a, by_kernel, elements)


def int4_matmul_dx_group_panel(
    dys: Sequence[Tensor],
    weights: Sequence[Int4Weight],
    g: Tensor | None = None,
    a: Tensor | None = None,
    by_kernel: bool = False,
    elements: int | None = None,
) -> Tensor:
    """Computes ``dX = sum dY_i·W_i + g·a`` for weights ``[N_i, K]`` of one K, which may differ otherwise.

    Panels run along K and hold all rows, so every output is one reduction over N, rounded once. If a single chunk of N
    rows is larger than a panel, N is cut too, and the sums are kept in float32 or wider.
    """
    head, dtype = weights[0], dys[0].dtype
    width, chunks = head.in_features, head.chunks
    dx = dys[0].new_empty(dys[0].shape[0], width)
    if dx.numel() == 0 or not any(weight.out_features for weight in weights):
        return dx.zero_()
    if not by_kernel and takes(dx):
        low = (None, None) if g is None or a is None else (g.to(dtype).float(), a.to(dtype).float())
        return native_matmul_dx([dy.float() for dy in dys], weights, *low).to(dtype)
    budget = elements or workspace().elements(dx.device)
    most = max(weight.out_features for weight in weights)
    row_step = min(most, whole_tiles(budget // CHUNK))
    # Panels in logical order are views of the columns, which begin at whole groups.
    logical = by_kernel or decodes(head, dtype)
    least = max(weight.column_step for weight in weights) // CHUNK if logical else 1
    width_step = whole_tiles(budget // row_step)
    chunk_step = min(chunks, max(least, width_step // CHUNK // least * least))
    # Rounding each of several partial sums would be less exact than one reduction.
    work = dtype if row_step >= most else torch.promote_types(dtype, torch.float32)
    decoder = PanelDecoder(head, work, row_step, chunk_step, by_kernel)
    decoders = [decoder.with_weight(weight) for weight in weights]
    if g is not None and a is not None:
        g, a = g.to(dtype).to(work), a.to(dtype).to(work)
    for first, last in spans(chunks, chunk_step):
        columns = slice(first * CHUNK, min(last * CHUNK, width))
        across = columns.stop - columns.start if decoder.logical else (last - first) * CHUNK
        total, beta = dx.new_empty(dx.shape[0], across, dtype=work), 0
        for dy, weight, decode in zip(dys, weights, decoders, strict=True):
            for start, stop in spans(weight.out_features, row_step):
                total.addmm_(dy[:, start:stop].to(work), decode(start, stop, first, last), beta=beta)
                beta = 1
        # LoRA's term is added last. Sums that started from a large one would lose their low bits to it.
        if g is not None and a is not None:
            total.addmm_(g, decoder.arrange(a[:, columns], last - first))
        dx[:, columns] = decoder.restore(total, columns.stop - columns.start)
    return dx


def int4_embedding_panel(ids: Tensor, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Decodes rows ``ids`` of the table: ``[*ids.shape, K]``. No other row is touched."""
    flat = ids.reshape(-1)
    picked = weight.gather(flat)
    out = torch.empty(flat.shape[0], weight.in_features, dtype=dtype, device=weight.device)
    chunks = weight.chunks
    step = max(1, workspace().elements(weight.device) // max(1, chunks * CHUNK))
    decoder = PanelDecoder(picked, dtype, min(step, flat.shape[0]), chunks)
    for start, stop in spans(flat.shape[0], step):
        out[start:stop] = decoder.restore(decoder(start, stop, 0, chunks), weight.in_features)
    return out.view(*ids.shape, weight.in_features)
