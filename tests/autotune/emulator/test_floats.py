"""Conversions against torch, to the bit; sums and products against exact fractions."""

from fractions import Fraction

import numpy as np
import torch

from mebp_triton.autotune.emulator import floats

RNG = np.random.default_rng(0)


def numbers(count):
    """Every kind of float32: any bits, and numbers of ordinary sizes."""
    any_bits = RNG.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ordinary = (RNG.standard_normal(count) * 2.0 ** RNG.integers(-20, 20, count)).astype(np.float32)
    return np.concatenate((any_bits, ordinary, np.float32([0.0, -0.0, np.inf, -np.inf])))


def test_rounding_as_in_torch():
    values = numbers(20000)
    values = values[~np.isnan(values)]
    for dtype, convert in ((torch.bfloat16, floats.f32_to_bf16), (torch.float16, floats.to_f16)):
        wanted = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (convert(values) == wanted).all()


def test_reading_as_in_torch():
    words = np.arange(65536, dtype=np.uint16)
    for dtype, convert in ((torch.bfloat16, floats.bf16_to_f32), (torch.float16, floats.f16_to_f32)):
        wanted = torch.from_numpy(words.view(np.int16)).view(dtype).float().numpy()
        assert np.array_equal(convert(words), wanted, equal_nan=True)


def test_a_nan_becomes_the_one_of_the_hardware():
    nan = np.float32([np.nan, -np.nan])
    assert (floats.f32_to_bf16(nan) == 0x7FFF).all() and (floats.to_f16(nan) == 0x7FFF).all()


def test_a_second_rounding_of_what_was_rounded_to_odd_is_right():
    """Just above the middle between two bfloat16 numbers: rounding to float32 first would lose what is above."""
    middle = 1 + 2.0**-8
    value = np.float64([middle + 2.0**-40, middle - 2.0**-40, -middle - 2.0**-40, middle])
    ulp = 2.0**-7
    assert floats.bf16_to_f32(floats.to_bf16(value)).tolist() == [1 + ulp, 1, -1 - ulp, 1]


def test_odd_sums_hold_everything_below_their_last_bit():
    first, second = np.float64([1.0, 1.0, -1.0, 3.0]), np.float64([2.0**-80, -(2.0**-80), 2.0**-80, 4.0])
    found = floats.odd_sum(first, second)
    for a, b, got in zip(first, second, found, strict=True):
        exact = Fraction(a) + Fraction(b)
        assert Fraction(got) == exact or (int(got.view(np.uint64)) & 1 and abs(Fraction(got) - exact) < 2.0**-52)
    # One step below or above the rounded sum, towards the exact one.
    assert found[0] > 1 and found[1] < 1 and found[2] > -1 and found[3] == 7


def test_subnormal_numbers_are_flushed():
    tiny = np.finfo(np.float32).tiny
    found = floats.flush(np.float32([tiny / 2, -tiny / 2, tiny, np.inf, 0]))
    assert found.tolist() == [0, 0, tiny, np.inf, 0] and np.signbit(found[1]) and not np.signbit(found[0])


def test_halves_and_back():
    words = np.uint32([0x12345678, 0xFFFF0000])
    assert floats.halves(words).tolist() == [[0x5678, 0x1234], [0, 0xFFFF]]
    assert (floats.packed(floats.halves(words)) == words).all()
