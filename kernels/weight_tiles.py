"""Device functions that bring tiles of a packed weight into a kernel, and order their columns.

A tile of BLOCK_K columns is decoded into two planes of BLOCK_K // 2 columns, the first and the last 32 of each chunk of
64, because a byte with two codes of 4 bits holds columns that are 32 apart. Where a product sums over the columns, it
sums over both planes, and nothing is put together. Where the columns are those of the result, the planes are joined:
one product of twice the width gives the compiler's layouts more to share among the warps than two of half the width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import both_levels, decode_planes


@triton.jit
def weight_of(tensors, strides, member, HAS_MINIMUM: tl.constexpr, MEMBERS: tl.constexpr):
    """The tensors and the strides of one member of a group, as ``load_codes`` takes them.

    tensors: as ``load_codes`` takes them, but each a tuple with a value for each member. strides: likewise the stride
    along the groups; the others are those of all members. What is not there has scales in its place.
    """
    packed_ptr = select(tensors[0], member, MEMBERS)
    scales_ptr = select(tensors[1], member, MEMBERS)
    scales_strides = (select(strides[1][0], member, MEMBERS), strides[1][1])
    minimum_ptr, super_scales_ptr, super_minimum_ptr = scales_ptr, scales_ptr, scales_ptr
    minimum_strides, super_scales_strides, super_minimum_strides = scales_strides, scales_strides, scales_strides
    if HAS_MINIMUM:
        minimum_ptr = select(tensors[2], member, MEMBERS)
        minimum_strides = (select(strides[2][0], member, MEMBERS), strides[2][1])
    if scales_ptr.dtype.element_ty == tl.int8:
        super_scales_ptr = select(tensors[3], member, MEMBERS)
        super_scales_strides = (select(strides[3][0], member, MEMBERS), strides[3][1])
        if HAS_MINIMUM:
            super_minimum_ptr = select(tensors[4], member, MEMBERS)
            super_minimum_strides = (select(strides[4][0], member, MEMBERS), strides[4][1])
    return (
        (packed_ptr, scales_ptr, minimum_ptr, super_scales_ptr, super_minimum_ptr),
        (strides[0], scales_strides, minimum_strides, super_scales_strides, super_minimum_strides),
    )


@triton.jit
def load_planes(
    tensors,
    strides,
    codebook_ptr,
    offs_n,
    mask_n,
    k0,
    K,
    FORM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    THREADS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Loads ``W[offs_n, k0 : k0 + BLOCK_K]`` and decodes it: see ``load_codes`` and ``decode_planes``.

    With MASK_K, columns from K on decode to zeros, whatever their padding holds.
    """
    codes = load_codes(tensors, strides, offs_n, mask_n, k0, K, FORM, BLOCK_K, THREADS)
    low, high = decode_planes(codes, codebook_ptr, FORM[0], FORM[2], HAS_CODEBOOK, DTYPE, ASM)
    if MASK_K:
        columns = plane_columns(k0, BLOCK_K)
        low = tl.where((columns < K)[None, :], low, 0.0)
        high = tl.where((columns + 32 < K)[None, :], high, 0.0)
    return low, high


@triton.jit
def load_codes(
    tensors, strides, offs_n, mask_n, k0, K, FORM: tl.constexpr, BLOCK_K: tl.constexpr, THREADS: tl.constexpr
):
    """Loads what ``W[offs_n, k0 : k0 + BLOCK_K]`` is decoded from: bytes; scales and minima of both planes.

    tensors: pointers to packed ``[N, packed_columns(K, BITS)]`` uint8, see ``layout``; scales and minimum
    ``[groups, N]`` float16, float32 or int8; with int8 super_scales and super_minimum ``[ceil(K / 256), N]`` float16.
    strides: the two of each, in the same order. k0 is a multiple of BLOCK_K. Rows whose mask is false are not read.
    FORM: ``(BITS, GROUP, HAS_MINIMUM)``. THREADS: see ``group_rows``.

    Returns a tuple: bytes of the low plane and of the high one, see ``packed_planes``; scales of the low plane and of
    the high one, minima of the low plane and of the high one, see ``group_rows``; super scales and super minima, which
    the planes share. What is not there has scales in its place.
    """
    packed_ptr, scales_ptr, minimum_ptr, super_scales_ptr, super_minimum_ptr = tensors
    packed_strides, scales_strides, minimum_strides, super_scales_strides, super_minimum_strides = strides
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    HAS_MINIMUM: tl.constexpr = FORM[2]
    W: tl.constexpr = BLOCK_K // 2
    packed, packed_high = packed_planes(packed_ptr, packed_strides, offs_n, mask_n, k0, K, BITS, BLOCK_K)
    # Both planes of a chunk have one scale, unless a group is a single run or less.
    scales_low = group_rows(scales_ptr, scales_strides, offs_n, mask_n, k0, 0, K, GROUP, BLOCK_K, W, THREADS)
    scales_high = scales_low
    if GROUP <= 32:
        scales_high = group_rows(scales_ptr, scales_strides, offs_n, mask_n, k0, 1, K, GROUP, BLOCK_K, W, THREADS)
    minima_low = scales_low
    minima_high = scales_high
    if HAS_MINIMUM:
        minima_low = group_rows(minimum_ptr, minimum_strides, offs_n, mask_n, k0, 0, K, GROUP, BLOCK_K, W, THREADS)
        minima_high = minima_low
        if GROUP <= 32:
            minima_high = group_rows(minimum_ptr, minimum_strides, offs_n, mask_n, k0, 1, K, GROUP, BLOCK_K, W, THREADS)
    super_scales = scales_low
    super_minima = scales_low
    if scales_low.dtype == tl.int8:
        ptr, steps = super_scales_ptr, super_scales_strides
        super_scales = group_rows(ptr, steps, offs_n, mask_n, k0, 0, K, 256, BLOCK_K, W, THREADS)
        super_minima = super_scales
        if HAS_MINIMUM:
            ptr, steps = super_minimum_ptr, super_minimum_strides
            super_minima = group_rows(ptr, steps, offs_n, mask_n, k0, 0, K, 256, BLOCK_K, W, THREADS)
    return packed, packed_high, scales_low, scales_high, minima_low, minima_high, super_scales, super_minima


@triton.jit
def packed_planes(packed_ptr, strides, offs_n, mask_n, k0, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The bytes of the low and the high plane of the chunks from k0 on, each ``[BLOCK_N, BLOCK_K // 2]``.

    packed_ptr ``[N, packed_columns(K, BITS)]`` uint8. With 4 bits both planes are in the same bytes.
    """
    offs_j = tl.arange(0, BLOCK_K // 2)
    offs_p = k0 // 2 + offs_j if BITS == 4 else plane_columns(k0, BLOCK_K)
    # A whole chunk is read where K ends within it, because the packed row is padded to its end.
    mask = mask_n[:, None] & (k0 + offs_j // 32 * 64 < K)[None, :]
    row_ptrs = packed_ptr + offs_n.to(tl.int64)[:, None] * strides[0]
    low = tl.load(row_ptrs + offs_p.to(tl.int64)[None, :] * strides[1], mask=mask, other=0)
    high = low
    if BITS == 8:
        high = tl.load(row_ptrs + (offs_p + 32).to(tl.int64)[None, :] * strides[1], mask=mask, other=0)
    return low, high


@triton.jit
def hold(packed):
    """The same bytes, in registers: an assembly without instructions, which the compiler must not move.

    Without it the pipeline would not load what a step hands to the next one, and bytes would be brought one by one into
    the layout in which the product wants them.
    """
    return tl.inline_asm_elementwise("", "=r,0", [packed], dtype=packed.dtype, is_pure=False, pack=4)


@triton.jit
def group_rows(
    ptr,
    strides,
    offs_n,
    mask_n,
    k0,
    plane,
    K,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The scales (or minima) of one plane (0: low, 1: high) of a tile; super scales, with 256 columns as the group.

    ptr ``[groups, N]``. A plane's run of 32 columns lies within one group, so one row per chunk of 64 is loaded; of
    groups of 16 it is two. Returns ``[BLOCK_N, 1]`` or ``[BLOCK_N, WIDTH]``: WIDTH is BLOCK_K // 2, or any width if the
    whole tile lies within one group.

    THREADS: how many share the load, if it is to be pipelined; else 0. The compiler pipelines a load only if every
    thread has four bytes of it, side by side. A smaller one stays in the loop, and each trip waits for it. So a number
    is loaded as often as it takes to have four bytes for every thread. Copies take turns by four columns. A thread of a
    product has as many side by side, or two, and so it reads one of two copies. Four copies or pieces and more are
    loaded with the first and the last bit of their numbers exchanged: if neighbouring threads read neighbours, the
    compiler takes them for an operand of a matrix instruction, and wants a layout without four bytes side by side. If
    THREADS is negative, each number is taken out of the word of four bytes in which it lies (see ``launch.in_words``).
    That takes fewer registers, but the compiler would not bring such scales into the layout of a product's left
    operand.
    """
    PIECE: tl.constexpr = 16 if GROUP == 16 else 32
    PIECES: tl.constexpr = 1 if GROUP >= BLOCK_K else BLOCK_K // 2 // PIECE
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    BYTES: tl.constexpr = offs_n.shape[0] * PIECES * SIZE
    WANTED: tl.constexpr = 1 if SIZE == 4 or THREADS * 4 <= BYTES else THREADS * 4 // BYTES
    COPIES: tl.constexpr = WANTED if WANTED * PIECES <= WIDTH else WIDTH // PIECES
    EACH: tl.constexpr = WIDTH // PIECES // COPIES
    TURN: tl.constexpr = 4 if (COPIES == 2 or COPIES > 1 and PIECES > 1) and EACH >= 4 else EACH
    LAST: tl.constexpr = COPIES if COPIES > 1 else PIECES
    TURNED: tl.constexpr = THREADS > 0 and LAST >= 4
    pieces = tl.arange(0, PIECES * COPIES) // COPIES
    if TURNED and COPIES == 1:
        pieces = pieces % 2 * (PIECES // 2) + pieces // 2 % (PIECES // 4) * 2 + pieces // (PIECES // 2)
    offs_c = k0 + plane * 32 + pieces * 64
    if GROUP == 16:
        offs_c = k0 + plane * 32 + pieces // 2 * 64 + pieces % 2 * 16
    offs_g = (offs_c // GROUP).to(tl.int64)
    rows_n = offs_n.to(tl.int64)[:, None]
    mask = mask_n[:, None] & (offs_c < K)[None, :]
    # [BLOCK_N, PIECES * COPIES]
    if THREADS < 0 and SIZE < 4:
        IN_WORD: tl.constexpr = 4 // SIZE
        word_ptrs = ptr.to(tl.pointer_type(tl.int32)) + offs_g[None, :] * (strides[0] // IN_WORD) + rows_n // IN_WORD
        rows = tl.load(word_ptrs, mask=mask, other=0) >> (offs_n % IN_WORD * (8 * SIZE))[:, None]
        rows = rows.to(tl.int16 if SIZE == 2 else tl.int8).to(ptr.dtype.element_ty, bitcast=True)
    else:
        rows = tl.load(ptr + offs_g[None, :] * strides[0] + rows_n * strides[1], mask=mask, other=0.0)
    if TURNED:
        rows = tl.reshape(rows, (offs_n.shape[0] * PIECES * COPIES // LAST, 2, LAST // 4, 2))
        rows = tl.reshape(tl.permute(rows, (0, 3, 2, 1)), (offs_n.shape[0], PIECES * COPIES))
    if PIECES * COPIES > 1:
        if PIECES > 1 and COPIES > 1:
            rows = tl.reshape(rows, (rows.shape[0], PIECES, COPIES))[:, :, None, :, None]
            rows = tl.broadcast_to(rows, (rows.shape[0], PIECES, EACH // TURN, COPIES, TURN))
        elif EACH > TURN:
            rows = tl.broadcast_to(rows[:, None, :, None], (rows.shape[0], EACH // TURN, COPIES, TURN))
        else:
            rows = tl.broadcast_to(rows[:, :, None], (rows.shape[0], PIECES * COPIES, EACH))
        rows = tl.reshape(rows, (rows.shape[0], WIDTH))
    return rows


@triton.jit
def float_scales(
    tensors,
    strides,
    offs_n,
    mask_n,
    k0,
    plane,
    K,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
):
    """``group_rows`` of the scales in float32; ``tensors`` and ``strides`` are those of ``load_codes``."""
    scales = group_rows(tensors[1], strides[1], offs_n, mask_n, k0, plane, K, GROUP, BLOCK_K, WIDTH, THREADS)
    if scales.dtype == tl.int8:
        supers = group_rows(tensors[3], strides[3], offs_n, mask_n, k0, plane, K, 256, BLOCK_K, WIDTH, THREADS)
        return both_levels(scales, supers)
    else:
        return scales.to(tl.float32)


@triton.jit
def plane_columns(k0, BLOCK_K: tl.constexpr):
    """Columns ``[BLOCK_K // 2]`` of the low plane of the tile from k0 on. Those of the high plane are 32 further on."""
    offs_j = tl.arange(0, BLOCK_K // 2)
    return k0 + offs_j // 32 * 64 + offs_j % 32


@triton.jit
def join_planes(low, high):
    """Puts planes ``[BLOCK_N, BLOCK_K // 2]`` together into a tile ``[BLOCK_N, BLOCK_K]``, columns in their order."""
    CHUNKS: tl.constexpr = low.shape[1] // 32
    pairs = tl.reshape(tl.join(low, high), (low.shape[0], CHUNKS, 32, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (low.shape[0], CHUNKS * 64))


@triton.jit
def to_bank_order(tile):
    """Puts the columns of a tile ``[rows, BLOCK_K]`` into the order in which joined planes go to shared memory.

    A thread has decoded neighbouring columns of each plane, and stores 8 columns of 16 bits at a time. Threads store
    side by side if the planes take turns by 8 columns in a tile of 64 columns, and if one plane follows the other in a
    wider tile. In the order of the columns, two threads would want the same bank.
    """
    A: tl.constexpr = 2 if tile.shape[1] == 64 else tile.shape[1] // 64
    B: tl.constexpr = 4 if tile.shape[1] == 64 else 2
    return _exchange(tile, A, B)


@triton.jit
def to_column_order(tile):
    """Undoes ``to_bank_order``."""
    A: tl.constexpr = 4 if tile.shape[1] == 64 else 2
    B: tl.constexpr = 2 if tile.shape[1] == 64 else tile.shape[1] // 64
    return _exchange(tile, A, B)


@triton.jit
def _exchange(tile, A: tl.constexpr, B: tl.constexpr):
    """Moves part (a, b) of each row to place (b, a), where a row is A times B parts."""
    parts = tl.reshape(tile, (tile.shape[0], A, B, tile.shape[1] // (A * B)))
    return tl.reshape(tl.permute(parts, (0, 2, 1, 3)), (tile.shape[0], tile.shape[1]))


@triton.jit
def select(values, member, MEMBERS: tl.constexpr):
    """``values[member]`` of a tuple with one value for each member of a group of weights.

    The value must not be None, which a device function cannot return.
    """
    if MEMBERS == 1:
        return values[0]
    else:
        return tl.where(member == 0, values[0], tl.where(member == 1, values[1], values[2]))
