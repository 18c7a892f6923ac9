"""Exact conversion of bitsandbytes' 4-bit weights (NF4, FP4) to ``Int4Weight``."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Int4Weight
from .names import GROUP_SIZES


def common_group_size(columns: int, blocksize: int) -> int | None:
    """The largest of our group sizes that divides rows and blocks, so that no group lies in two blocks; or None."""
    return max((size for size in GROUP_SIZES if columns % size == 0 and blocksize % size == 0), default=None)


def int4_from_bnb(
    packed: Tensor, absmax: Tensor, codebook: Tensor, shape: tuple[int, int], blocksize: int
) -> Int4Weight:
    """Converts the weight that bitsandbytes holds as these tensors.

    Args:
        packed: ``N * K / 2`` bytes in any shape and dtype, with the first of two codes in the high nibble.
        absmax: ``[ceil(N * K / blocksize)]`` float32; ``resolve_absmax`` makes it from a quantised one.
        codebook: ``[16]``, bitsandbytes' ``code``.
        shape: (N, K), out and in features.
        blocksize: number of consecutive weights of the flat matrix that share an absmax.

    Raises:
        ValueError: a tensor has another size, or K does not consist of whole groups that lie within a block.
    """
    rows, columns = shape
    if any(type(size) is not int or size < 1 for size in (rows, columns, blocksize)):
        raise ValueError(f"shape and blocksize must be positive integers, got {shape!r:.100} and {blocksize!r:.100}")
    group_size = common_group_size(columns, blocksize)
    if group_size is None:
        raise ValueError(
            f"in_features {columns} and blocks of {blocksize} weights have no common group of 32, 64 or 128 weights: "
            f"convert the unquantised model instead"
        )
    data = packed.contiguous().view(torch.uint8).flatten()
    blocks = -(-rows * columns // blocksize)
    for name, tensor, wanted in (("packed", data, rows * columns // 2), ("absmax", absmax, blocks)):
        if tensor.numel() != wanted:
            raise ValueError(f"{name} has {tensor.numel()} elements, wanted {wanted} for a weight of shape {shape}")
    if not absmax.isfinite().all():
        raise ValueError("absmax is not finite")
    if not codebook.isfinite().all():
        raise ValueError("codebook must be finite")
    codes = torch.stack((data >> 4, data & 15), dim=1).view(rows, columns)
    block_of_group = torch.arange(0, rows * columns, group_size, device=absmax.device) // blocksize
    scales = absmax.flatten().float()[block_of_group].view(rows, -1).t()
    return Int4Weight.from_codes(codes, scales, group_size, codebook=codebook.float())


def resolve_absmax(
    absmax: Tensor, quant_map: Tensor, nested_absmax: Tensor, nested_blocksize: int, offset: float | Tensor
) -> Tensor:
    """Decodes a quantised absmax: uint8 codes into a map of 256 levels, times a scale per block, plus an offset.

    absmax ``[blocks]`` uint8, quant_map ``[256]``, nested_absmax ``[ceil(blocks / nested_blocksize)]``; returns
    ``[blocks]`` float32.
    """
    if type(nested_blocksize) is not int or nested_blocksize < 1:
        raise ValueError(f"nested_blocksize must be a positive integer, got {nested_blocksize!r:.100}")
    nested = torch.arange(absmax.numel(), device=absmax.device) // nested_blocksize
    return quant_map[absmax.flatten().long()] * nested_absmax.flatten()[nested] + offset
