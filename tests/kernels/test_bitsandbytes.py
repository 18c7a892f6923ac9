"""bitsandbytes' packing as ours: decoded, it gives the bits that bitsandbytes gives."""

import bitsandbytes
import pytest
import torch

from mebp_triton.kernels.bitsandbytes import common_group_size, int4_from_bnb, resolve_absmax
from mebp_triton.kernels.reference import decode


@pytest.mark.parametrize(
    ("shape", "blocksize", "group_size"),
    [
        ((6, 128), 64, 64),
        ((6, 128), 128, 128),
        ((3, 256), 256, 128),
        ((5, 96), 64, 32),  # blocks straddle rows, but no group straddles blocks
        ((3, 96), 128, 32),  # the last block is not full
        ((7, 64), 4096, 64),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_any_block_size(shape, blocksize, group_size, kind):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, state = bitsandbytes.functional.quantize_4bit(values, blocksize=blocksize, quant_type=kind)
    weight = int4_from_bnb(packed, state.absmax, state.code, shape, blocksize)
    assert weight.group_size == group_size
    state.shape = torch.Size((1, values.numel()))  # on a CPU, version 0.50 starts new blocks with every row
    truth = bitsandbytes.functional.dequantize_4bit(packed, state).view(shape)
    assert torch.equal(decode(weight, torch.float32), truth)
    assert (truth - values).norm() < 0.2 * values.norm()


def test_nested_scales_are_resolved_to_the_bit():
    values = torch.randn(64, 640, generator=torch.Generator().manual_seed(2))
    _, state = bitsandbytes.functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
    truth = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nested = state.state2
    found = resolve_absmax(state.absmax, nested.code, nested.absmax, nested.blocksize, state.offset)
    assert found.dtype == torch.float32 and torch.equal(found, truth)


def packed_of(shape):
    return torch.zeros(shape[0] * shape[1] // 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4, 48), "packed": packed_of((4, 48))}, "in_features 48 and blocks of 64 .* unquantised model"),
        ({"blocksize": 48}, "in_features 64 and blocks of 48 weights have no common group"),
        ({"packed": packed_of((4, 64))[:-1]}, "packed has 127 elements, wanted 128"),
        ({"absmax": torch.ones(5)}, "absmax has 5 elements, wanted 4"),
        ({"absmax": torch.tensor([1.0, 1.0, float("nan"), 1.0])}, "absmax is not finite"),
        ({"codebook": torch.full((16,), float("inf"))}, "codebook must be finite"),
        ({"codebook": torch.zeros(8)}, "codebook must be"),
        ({"shape": (4.0, 64)}, "positive integers"),
        ({"blocksize": 0}, "positive integers"),
    ],
)
def test_what_does_not_fit_together_is_named(change, message):
    good = {"packed": packed_of((4, 64)), "absmax": torch.ones(4), "codebook": torch.zeros(16)}
    good |= {"shape": (4, 64), "blocksize": 64}
    int4_from_bnb(**good)
    with pytest.raises(ValueError, match=message):
        int4_from_bnb(**{**good, **change})


@pytest.mark.parametrize("blocksize", [0, -256, 256.0])
def test_a_nested_blocksize_that_is_none(blocksize):
    with pytest.raises(ValueError, match="nested_blocksize must be a positive integer"):
        resolve_absmax(torch.zeros(4, dtype=torch.uint8), torch.zeros(256), torch.ones(1), blocksize, 0.0)


@pytest.mark.parametrize(
    ("columns", "blocksize", "wanted"), [(128, 64, 64), (96, 64, 32), (4096, 4096, 128), (48, 64, None), (64, 48, None)]
)
def test_the_largest_group_that_cuts_rows_and_blocks_alike(columns, blocksize, wanted):
    assert common_group_size(columns, blocksize) == wanted
