"""Numbers in 8 bits: blockwise dynamic quantization (Dettmers et al., arXiv 2110.02861), as bitsandbytes has it.

256 consecutive values share a scale: the value of largest magnitude, with its sign, so that this one is kept exactly.
A code stands for one of 256 values in [-1, 1], or in [0, 1] where no value is negative. They are denser towards 0:
seven decades, each with twice as many values as the one below.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BLOCK = 256  # values that share a scale


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The values of the 256 codes, ascending, float32: those of ``bitsandbytes.functional.create_dynamic_map``."""
    values = [0.0, 1.0]
    # A plan traces the optimizer with fake tensors. One of them that stayed here would turn every later code into one.
    with _disable_current_modes():
        for decade in range(7):
            means = torch.linspace(0.1, 1.0, (2**decade if signed else 2 ** (decade + 1)) + 1, dtype=torch.float32)
            for mean in ((means[:-1] + means[1:]) / 2 * 10.0 ** (decade - 6)).tolist():
                values += [mean, -mean] if signed else [mean]
        return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encoded_bytes(count: int) -> int:
    """Bytes that ``count`` values take: a float32 for every block and a byte for each value, to a multiple of 4."""
    return 4 * -(-count // BLOCK) + 4 * -(-count // 4)


def encode(values: Tensor, into: Tensor, signed: bool) -> None:
    """Writes the nearest code of each value.

    With ``signed=False`` no value but 0 becomes 0. AdamW divides by the root of the second moment, so a 0 there beside
    a first moment that is not 0 would make the step infinite.

    Args:
        values: [count], finite; none is negative where ``signed`` is False.
        into: uint8 [encoded_bytes(count)], on the values' device; takes the scales' bytes, then the codes.
    """
    count = values.numel()
    blocks = -(-count // BLOCK)
    padded = torch.nn.functional.pad(values.to(torch.float32), (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    scales = padded.gather(1, padded.abs().argmax(dim=1, keepdim=True))
    into[: 4 * blocks].view(torch.float32).copy_(scales[:, 0])
    padded = padded / torch.where(scales == 0, 1.0, scales)
    table = dynamic_map(signed, values.device)
    codes = torch.bucketize(padded, (table[:-1] + table[1:]) / 2)
    if not signed:
        codes = torch.where(padded > 0, codes.clamp_min(1), codes)
    into[4 * blocks :][:count].copy_(codes.view(-1)[:count])


def decode(encoded: Tensor, count: int, signed: bool, dtype: torch.dtype) -> Tensor:
    """The [count] values of ``dtype`` that ``encode`` has written."""
    blocks = -(-count // BLOCK)
    scales = encoded[: 4 * blocks].view(torch.float32)
    values = dynamic_map(signed, encoded.device)[encoded[4 * blocks :][:count].int()]
    return values.mul_(scales.repeat_interleave(BLOCK)[:count]).to(dtype)
