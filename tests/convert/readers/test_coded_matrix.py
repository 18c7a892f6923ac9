"""Codes of any width and grouping: the weights they stand for, and which of them our layout holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_models import bit_fields

from mebp_triton.convert.readers import coded_matrix
from mebp_triton.convert.readers.coded_matrix import E2M1, CodedMatrix, even_groups, is_sorted, stack, unpack_bits
from mebp_triton.kernels.reference import decode


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [96, 101])
@pytest.mark.parametrize("word", [8, 32])
def test_fields_of_every_width(bits, count, word):
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, count))
    packed = torch.from_numpy(bit_fields(values, bits, word).view(np.int32 if word == 32 else np.uint8))
    unpacked = unpack_bits(packed, bits)
    assert unpacked.dtype == torch.uint8 and np.array_equal(unpacked[:, :count].numpy(), values)


def matrix(bits=4, group_size=32, rows=5, columns=100, dtype=torch.float16, groups=None):
    random = torch.Generator().manual_seed(bits)
    groups = even_groups(columns, group_size) if groups is None else groups
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    scales = (torch.rand(int(groups.max()) + 1, rows, generator=random) * 0.1).to(dtype)
    return CodedMatrix(codes, bits, scales, groups, group_size)


def exact(coded, zeros):
    zeros, scales = (tensor.double()[coded.groups].t() for tensor in (zeros, coded.scales))
    return (coded.codes.double() - zeros) * scales


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("fraction", [0, 0.25])
@pytest.mark.parametrize("panel_elements", [1, 150, 1 << 22])
def test_a_decoded_matrix_is_rounded_once(bits, fraction, panel_elements, monkeypatch):
    monkeypatch.setattr(coded_matrix, "PANEL_ELEMENTS", panel_elements)
    coded = matrix(bits)
    middle = torch.full_like(coded.scales, 1 << (bits - 1))
    zeros = torch.randint(0, 1 << bits, coded.scales.shape) + fraction
    assert coded.with_zeros(middle) is coded
    for whole, zero in ((coded, middle), (coded.with_zeros(zeros), zeros)):
        assert torch.equal(whole.decode(), exact(coded, zero).float())
        weight = whole.to_int4()
        assert weight.bits == (4 if bits <= 4 else 8)
        assert torch.equal(decode(weight, torch.float32), whole.decode())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("affine", [False, True])
def test_codes_may_be_unpacked_some_rows_at_a_time(bits, affine, monkeypatch):
    monkeypatch.setattr(coded_matrix, "PANEL_ELEMENTS", 200)
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return whole.codes[start:stop]

    whole = matrix(bits)
    whole = whole.with_zeros(torch.full_like(whole.scales, 1)) if affine else whole
    panels = replace(whole, codes=rows)
    weight = panels.to_int4()
    assert weight.form == whole.to_int4().form and asked == [(0, 2), (2, 4), (4, 5)]
    for name, tensor in whole.to_int4().tensors().items():
        assert torch.equal(weight.tensors()[name], tensor), name
    assert torch.equal(panels.decode(), whole.decode())


def test_levels():
    coded = matrix()
    coded = CodedMatrix(coded.codes, 4, coded.scales, coded.groups, 32, levels=E2M1)
    wanted = E2M1[coded.codes.long()] * coded.scales.float()[coded.groups].t()
    assert torch.equal(coded.decode(), wanted)
    weight = coded.to_int4()
    assert weight.scheme == "codebook" and torch.equal(decode(weight, torch.float32), wanted)


def test_e2m1_is_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    for code, value in enumerate(E2M1.tolist()):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert (abs(value), np.signbit(value)) == (size, code >= 8)


SIZES = [(4, *pair) for pair in ((32, 32), (64, 64), (128, 128), (96, 32), (100, 128), (256, 128), (192, 64))]


@pytest.mark.parametrize(("bits", "size", "ours"), [*SIZES, (6, 16, 16), (8, 128, 128), (8, 48, 16), (8, 256, 128)])
def test_the_group_size_is_the_matrix_own_or_the_largest_that_lies_within(bits, size, ours):
    coded = matrix(bits, group_size=size, columns=600 if size != 100 else 100)
    weight = coded.to_int4()
    assert weight.group_size == ours and torch.equal(decode(weight, torch.float32), coded.decode())


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("affine", [False, True])
def test_codes_of_4_bits_in_groups_that_only_8_bits_have(size, affine):
    coded = matrix(group_size=size)
    coded = coded.with_zeros(torch.full_like(coded.scales, 3)) if affine else coded
    weight = coded.to_int4()
    assert (weight.bits, weight.group_size) == (8, 16) and torch.equal(decode(weight, torch.float32), coded.decode())


def test_scales_are_float16_where_that_holds_them_exactly():
    for value, dtype in ((2.0**-24, "float16"), (2.0**-25, "float32"), (65504.0, "float16"), (65536.0, "float32")):
        coded = matrix(dtype=torch.bfloat16 if value != 65504 else torch.float32)
        coded.scales[0, 0] = value
        weight = coded.to_int4()
        wanted = dtype if value != 65504 else "float32"  # random float32 numbers beside it
        assert str(weight.scales.dtype) == f"torch.{wanted}", value
        assert torch.equal(decode(weight, torch.float32), coded.decode())


def test_a_minimum_that_float16_cannot_hold_makes_both_float32():
    coded = matrix()
    assert coded.with_zeros(torch.full_like(coded.scales, 2)).to_int4().minimum.dtype == torch.float16
    weight = coded.with_zeros(torch.full_like(coded.scales, 7)).to_int4()
    assert weight.scales.dtype == weight.minimum.dtype == torch.float32


@pytest.mark.parametrize(
    ("coded", "words"),
    [
        (matrix(bits=5, group_size=24), "codes in groups of 24"),
        (matrix(group_size=8), "codes in groups of 8"),
        (replace(matrix(group_size=16), levels=E2M1), "codes in groups of 16"),
        (matrix(groups=torch.arange(100) % 3), "codes in act-order, which desc_act=False or static groups would avoid"),
    ],
)
def test_what_cannot_be_held_says_what_it_is(coded, words):
    assert coded.to_int4() is None and coded.decoded().codes == words


def two_levels() -> CodedMatrix:
    """A matrix whose scales and minima have a second level for each 256 columns."""
    coded, supers = matrix(columns=320), torch.rand(2, 2, 5).half()
    steps = torch.randint(1, 64, (2, 10, 5), dtype=torch.int8)
    levels = {"super_scales": supers[0], "super_minimum": supers[1]}
    return replace(coded, scales=steps[0], minimum=steps[1], **levels)


@pytest.mark.parametrize("coded", [matrix(columns=96), two_levels()])
def test_rows_and_columns_change_places(coded):
    plain = coded.decode()
    rows = torch.tensor([4, 0, 0, 2])
    assert torch.equal(coded.take_rows(rows).decode(), plain[rows])
    both = stack([coded, coded.take_rows(rows)])
    assert torch.equal(both.decode(), torch.cat((plain, plain[rows])))
    for size in (32, 16):
        columns = torch.arange(coded.shape[1]).view(-1, size).roll(1, 0).flatten()
        taken = coded.take_columns(columns)
        assert torch.equal(taken.decode(), plain[:, columns])
        weight = taken.to_int4()
        assert weight.group_size == size and torch.equal(decode(weight, torch.float32), plain[:, columns])


def test_an_order_is_sorted():
    assert is_sorted(torch.arange(5)) and not is_sorted(torch.tensor([0, 2, 1]))
