"""Numbers in 8 bits: bitsandbytes' table, the nearest code of float64, and no second moment that becomes 0."""

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mebp_triton.store.dynamic8 import BLOCK, decode, dynamic_map, encode, encoded_bytes

CPU = torch.device("cpu")


def through(values, signed):
    encoded = torch.full((encoded_bytes(values.numel()),), 255, dtype=torch.uint8)
    encode(values, encoded, signed)
    return decode(encoded, values.numel(), signed, values.dtype), encoded


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_that_of_bitsandbytes(signed):
    ours = dynamic_map(signed, CPU)
    assert ours.shape == (256,)
    torch.testing.assert_close(ours, create_dynamic_map(signed=signed), rtol=1e-6, atol=0)
    assert (ours.diff() > 0).all()


def test_a_plan_that_traces_the_optimizer_first_changes_no_code():
    """A fake table would be kept, and every later encoding would write nothing, without an error."""
    values = torch.linspace(-1, 2, 300)
    wanted, _ = through(values, True)
    dynamic_map.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        encode(torch.ones(300), torch.empty(encoded_bytes(300), dtype=torch.uint8), True)
    assert type(dynamic_map(True, CPU)) is torch.Tensor
    assert torch.equal(through(values, True)[0], wanted)


@pytest.mark.parametrize(
    ("count", "size"), [(0, 0), (1, 4 + 4), (4, 4 + 4), (5, 4 + 8), (256, 4 + 256), (257, 8 + 260)]
)
def test_the_size(count, size):
    assert encoded_bytes(count) == size


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_value_becomes_the_nearest(signed, count, dtype):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype).pow(3)
    values = values if signed else values.abs()
    found, encoded = through(values, signed)
    assert encoded.numel() == encoded_bytes(count) and found.dtype == dtype
    table = dynamic_map(signed, CPU).double()
    for start in range(0, count, BLOCK):
        block = values[start : start + BLOCK].double()
        scale = block[block.abs().argmax()]
        nearest = (table * scale)[None, :].sub(block[:, None]).abs().amin(dim=1)
        error = (found[start : start + BLOCK].double() - block).abs()
        assert (error <= nearest + 1e-6 * scale.abs()).all()
        assert found[start : start + BLOCK].abs().max() == scale.abs().float().to(dtype), "the largest is kept exactly"


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=600), st.booleans())
@settings(max_examples=60, deadline=None)
def test_encoding_again_changes_no_bit_and_no_sign(numbers, signed):
    values = torch.tensor(numbers, dtype=torch.float32)
    values[values.abs() < 1e-30] = 0  # a product with the least code would leave float32
    values = values if signed else values.abs()
    found, encoded = through(values, signed)
    again, encoded_again = through(found, signed)
    assert torch.equal(encoded[: 4 * -(-len(numbers) // BLOCK)], encoded_again[: 4 * -(-len(numbers) // BLOCK)])
    assert torch.equal(found, again)
    assert (found * values.sign() >= 0).all()


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    values = torch.full((BLOCK,), 1e-20)
    values[3], values[7] = 1.0, 0.0
    found, _ = through(values, signed=False)
    assert found[3] == 1 and found[7] == 0
    assert (found[values == values[0]] == dynamic_map(False, CPU)[1]).all(), "but the least"


def test_zeros_stay_and_nothing_of_nothing():
    for signed in (True, False):
        found, encoded = through(torch.zeros(300), signed)
        assert not found.any() and not dynamic_map(signed, CPU)[encoded[8:].int()].any()
        assert through(torch.zeros(0), signed)[0].shape == (0,)
