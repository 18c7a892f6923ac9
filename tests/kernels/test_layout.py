"""Where each nibble lies, and what an ``Int4Weight`` accepts. The expected bytes are the format, written by hand."""

import dataclasses

import pytest
import torch

from mebp_triton.kernels.layout import LAYOUT, TENSORS, Int4Weight, group_count, pack, packed_columns, padded, unpack
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.reference import decode

WIDTHS = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 449)


def random_codes(rows, columns, seed=0, bits=4):
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_golden_bytes():
    assert LAYOUT == "planar64-v1"
    codes = torch.tensor([[column % 16 for column in range(32)] + [15 - column % 16 for column in range(32)]])
    expected = bytes.fromhex("f0e1d2c3b4a5968778695a4b3c2d1e0f" * 2)
    assert bytes(pack(codes.to(torch.uint8))[0].tolist()) == expected


@pytest.mark.parametrize(
    ("column", "byte", "value"),
    [(0, 0, 0x09), (1, 1, 0x09), (31, 31, 0x09), (32, 0, 0x90), (63, 31, 0x90), (64, 32, 0x09), (96, 32, 0x90)],
)
def test_nibble_of_a_column(column, byte, value):
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    codes[1, column] = 9
    expected = torch.zeros(2, 64, dtype=torch.uint8)
    expected[1, byte] = value
    assert torch.equal(pack(codes), expected)


def test_every_byte_value():
    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    codes = unpack(packed, 64)
    for row in range(8):
        for j in range(32):
            byte = 32 * row + j
            assert (int(codes[row, j]), int(codes[row, 32 + j])) == (byte % 16, byte // 16)
    assert torch.equal(pack(codes), packed)


@pytest.mark.parametrize("columns", [1, 31, 64, 65, 127, 160])
def test_codes_of_8_bits_lie_in_order(columns):
    codes = random_codes(3, columns, bits=8)
    packed = pack(codes, 128, bits=8)
    assert torch.equal(packed[:, :columns], codes)
    assert packed.shape == (3, padded(columns)) and (packed[:, columns:] == 128).all()
    shared = pack(codes, 128, bits=8, copy=False)
    assert torch.equal(shared, packed)
    codes[:] = 0
    assert packed.any(), "packed codes share no memory with what they were made of"
    assert shared.any() == (columns != 64), "unless they may"


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(("rows", "bits"), [(0, 4), (3, 4), (0, 8), (3, 8)])
def test_round_trip(rows, columns, bits):
    codes = random_codes(rows, columns, bits=bits)
    packed = pack(codes, bits=bits)
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert torch.equal(unpack(packed, columns), codes)


def test_bytes_of_a_packed_row():
    assert [packed_columns(k) for k in (1, 64, 65, 200)] == [32, 32, 64, 128]
    assert [packed_columns(k, 8) for k in (1, 64, 65, 200)] == [64, 64, 128, 256]


@pytest.mark.parametrize("pad_code", [0, 8, 15])
def test_padding_is_the_pad_code(pad_code):
    codes = unpack(pack(random_codes(2, 33), pad_code), 64)
    assert (codes[:, 33:] == pad_code).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_padding_is_code_0_but_for_the_symmetric_scheme(form):
    """The bytes of a store do not depend on who packed it."""
    scheme, size, bits = form
    scales = torch.ones(-(-33 // size), 3)
    extra = {"affine": {"minimum": scales}, "codebook": {"codebook": torch.ones(16)}}
    weight = Int4Weight.from_codes(random_codes(3, 33, bits=bits), scales, size, **extra.get(scheme, {}), bits=bits)
    assert (weight.scheme, weight.group_size, weight.bits, weight.chunks) == (*form, 1)
    middle = {4: 8, 8: 128}[bits]
    assert (unpack(weight.packed, 64)[:, 33:] == (middle if scheme == "symmetric" else 0)).all()
    assert torch.equal(pack(random_codes(3, 33)), pack(random_codes(3, 33), pad_code=0))


def test_pack_takes_any_strides():
    codes = random_codes(96, 5)
    assert torch.equal(unpack(pack(codes.t()), 96), codes.t())


def test_pack_refuses():
    with pytest.raises(ValueError, match="0..15, got 16"):
        pack(torch.tensor([[16]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(2, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="2-D"):
        pack(torch.zeros(64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"),
    [(1, 32, 2), (64, 32, 2), (65, 32, 4), (1, 64, 1), (65, 64, 2), (64, 128, 1), (129, 128, 2), (256, 128, 2)],
)
def test_group_count_covers_the_padded_width(in_features, group_size, expected):
    assert group_count(in_features, group_size) == expected


def test_code_zero_is_minus_eight():
    codes, scales = torch.zeros(1, 64, dtype=torch.uint8), torch.full((1, 1), 0.5).half()
    assert (decode(Int4Weight.from_codes(codes, scales, 64)) == -4).all()
    assert (decode(Int4Weight.from_codes(codes, scales, 64, bits=8)) == -64).all()


@pytest.mark.parametrize(("group_size", "bits"), [(size, bits) for scheme, size, bits in FORMS if scheme == "affine"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_symmetric_padding_decodes_to_zero(columns, group_size, bits):
    scales = torch.full((-(-columns // group_size), 2), 0.5).half()
    weight = Int4Weight.from_codes(random_codes(2, columns, bits=bits), scales, group_size, bits=bits)
    assert weight.scales.shape == (group_count(columns, group_size), 2)
    whole = decode(dataclasses.replace(weight, in_features=padded(columns)))
    assert torch.equal(whole[:, :columns], decode(weight))
    assert (whole[:, columns:] == 0).all()


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return request.param


@pytest.fixture(params=[torch.float16, torch.int8], ids=["one-level", "two-level"])
def weight(request, make_weight, form):
    return make_weight(11, 600, form.group_size, form.scheme, request.param, bits=form.bits)


def test_properties(weight, form):
    scheme, group_size, bits = form
    assert weight.scheme == scheme and weight.bits == bits and weight.chunks == 10
    assert weight.shape == (11, 600) and weight.out_features == 11 and weight.device == weight.packed.device
    names = {"packed", "scales"} | {"symmetric": set(), "affine": {"minimum"}, "codebook": {"codebook"}}[scheme]
    of_groups = group_count(600, group_size) * 11 * (1 if weight.two_level else 2)
    if weight.two_level:
        names |= {"super_scales", "super_minimum"} if scheme == "affine" else {"super_scales"}
        of_groups += 3 * 11 * 2
    extra = {"symmetric": 0, "affine": of_groups, "codebook": 64}[scheme]
    assert weight.nbytes == 11 * 80 * bits + of_groups + extra
    assert set(weight.tensors()) == names == set(TENSORS) & names


def test_scales_of_two_levels_are_exact_products(make_weight, form):
    weight = make_weight(11, 600, form.group_size, form.scheme, torch.int8, bits=form.bits)
    for dtype in (torch.float32, torch.float64):
        pairs = [(weight.float_scales(dtype), weight.scales, weight.super_scales)]
        if form.scheme == "affine":
            pairs.append((weight.float_minimum(dtype), weight.minimum, weight.super_minimum))
        for found, values, supers in pairs:
            assert found.dtype == dtype and found.shape == values.shape
            for group in range(len(values)):
                truth = values[group].double() * supers[group * form.group_size // 256].double()
                assert torch.equal(found[group].double(), truth)
    assert form.scheme == "affine" or weight.float_minimum() is None


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (3, 7), (10, 11), (8, 20), (4, 4)])
def test_rows_are_views(weight, start, stop):
    part = weight.rows(start, stop)
    assert torch.equal(decode(part), decode(weight)[start:stop])
    if start < stop:
        assert part.packed.data_ptr() == weight.packed.data_ptr() + start * weight.packed.shape[1]
        assert part.scales.data_ptr() == weight.scales.data_ptr() + start * weight.scales.element_size()


def test_gathered_rows_are_copies(weight):
    ids = torch.tensor([3, 0, 10, 3], device=weight.device)
    part = weight.gather(ids)
    assert part.shape == (4, 600) and torch.equal(decode(part), decode(weight)[ids])
    assert set(part.tensors()) == set(weight.tensors())


def test_a_weight_does_not_change_and_is_itself_alone(weight):
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.in_features = 100
    assert {weight: 1}[weight] == 1 and weight != dataclasses.replace(weight)


def test_scales_become_contiguous():
    for transposed in (torch.ones(3, 2), torch.ones(3, 2).half()):
        weight = Int4Weight.from_codes(random_codes(3, 100), transposed.t(), 64, minimum=transposed.t())
        assert weight.scales.is_contiguous() and weight.minimum.is_contiguous()


def test_rows_in_another_order_are_copies(weight):
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(weight.device)
    permuted = weight.gather(order)
    assert torch.equal(decode(permuted), decode(weight)[order])
    assert permuted.packed.data_ptr() != weight.packed.data_ptr()


def test_to_moves_every_tensor(weight):
    moved = weight.to("meta")
    assert set(moved.tensors()) == set(weight.tensors())
    assert all(tensor.device.type == "meta" for tensor in moved.tensors().values())
    assert moved.shape == weight.shape and moved.group_size == weight.group_size


def test_to_copies_only_if_asked(weight):
    same, copied = weight.to(weight.device), weight.to(weight.device, copy=True)
    for name, tensor in weight.tensors().items():
        assert same.tensors()[name].data_ptr() == tensor.data_ptr()
        assert copied.tensors()[name].data_ptr() != tensor.data_ptr()
        assert torch.equal(copied.tensors()[name], tensor)


ZEROS = torch.zeros(2, 3, dtype=torch.float16)
PACKED = torch.zeros(3, 64, dtype=torch.uint8)
BYTES, SUPERS = ZEROS.char(), ZEROS[:1]
TWO_LEVEL = {"scales": BYTES, "super_scales": SUPERS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 48}, "one of .32, 64, 128., got 48"),
        ({"packed": PACKED.to(torch.int8)}, "packed must be 2-D uint8"),
        ({"packed": PACKED[0]}, "packed must be 2-D uint8"),
        ({"group_size": 16}, "one of .32, 64, 128., got 16 for codes of 4 bits"),
        ({"packed": PACKED[:, :32]}, r"64 columns \(4 bits\) or 128 \(8 bits\) for in_features=100, got 32"),
        ({"packed": PACKED.repeat(1, 2), "codebook": torch.zeros(16)}, "a codebook is for codes of 4 bits"),
        ({"packed": PACKED.repeat(1, 2), "group_size": 8}, "one of .16, 32, 64, 128., got 8 for codes of 8 bits"),
        ({"in_features": 129}, "96 columns"),
        ({"scales": ZEROS.t()}, "scales must have shape .2, 3., got .3, 2."),
        ({"scales": ZEROS[:1]}, "scales must have shape"),
        ({"scales": ZEROS.bfloat16()}, "scales must be float16 or float32"),
        ({"minimum": ZEROS[:, :2]}, "minimum must have shape"),
        ({"minimum": ZEROS.double()}, "minimum must be float16 or float32"),
        ({"minimum": ZEROS, "codebook": torch.zeros(16)}, "not both"),
        ({"scales": BYTES}, "scales must be float16 or float32, or int8 with super_scales, got torch.int8"),
        ({"super_scales": SUPERS}, "scales must be int8 beside super_scales, got torch.float16"),
        (
            {**TWO_LEVEL, "super_scales": ZEROS},
            "super_scales must be float16 of shape .1, 3., got .*2, 3.",
        ),
        ({**TWO_LEVEL, "super_scales": SUPERS.float()}, "super_scales must be float16 of shape .*got torch.float32"),
        ({**TWO_LEVEL, "super_minimum": SUPERS}, "super_minimum needs a minimum"),
        ({**TWO_LEVEL, "minimum": ZEROS}, "both have two levels, or neither"),
        ({"minimum": BYTES, "super_minimum": SUPERS}, "both have two levels, or neither"),
        ({**TWO_LEVEL, "minimum": BYTES}, "minimum must be float16 or float32, or int8 with super_minimum"),
        ({"codebook": torch.zeros(15)}, "codebook must be float32 of shape"),
        ({"codebook": torch.zeros(16).half()}, "codebook must be float32 of shape"),
    ],
)
def test_int4_weight_refuses(change, message):
    good = {"packed": PACKED, "scales": ZEROS, "in_features": 100, "group_size": 64}
    Int4Weight(**good)
    with pytest.raises(ValueError, match=message):
        Int4Weight(**{**good, **change})


@pytest.mark.parametrize("groups", [0, 1, 3, 5])
def test_from_codes_refuses_missing_and_surplus_groups(groups):
    codes = random_codes(3, 100)
    Int4Weight.from_codes(codes, torch.ones(2, 3), 64, minimum=torch.ones(2, 3))
    with pytest.raises(ValueError, match="scales must have shape"):
        Int4Weight.from_codes(codes, torch.ones(groups, 3), 64)
    with pytest.raises(ValueError, match="minimum must have shape"):
        Int4Weight.from_codes(codes, torch.ones(2, 3), 64, minimum=torch.ones(groups, 3))
    with pytest.raises(ValueError, match="group_size must be one of"):
        Int4Weight.from_codes(codes, torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match=r"scales must have shape \(3, 3\), got \(4, 3\)"):
        Int4Weight.from_codes(random_codes(3, 65), torch.ones(4, 3), 32)  # as many as after padding


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (0, 128), (256, 384), (256, 600), (512, 1200)])
def test_columns_are_views(weight, form, start, stop):
    part = weight.columns(start, stop)
    assert part.packed.data_ptr() == weight.packed.data_ptr() + start * form.bits // 8 and part.bits == form.bits
    assert torch.equal(decode(part), decode(weight)[:, start:stop])


@pytest.mark.parametrize(
    ("group_size", "start", "step"), [(32, 32, 64), (64, 32, 64), (128, 64, 128), (32, 128, 256), (128, 128, 256)]
)
def test_columns_start_with_a_group(make_weight, group_size, start, step):
    weight = make_weight(5, 512, group_size, scale_dtype=torch.int8 if step == 256 else torch.float16)
    assert weight.column_step == step
    with pytest.raises(ValueError, match=f"columns must start at a multiple of {step}, got {start}"):
        weight.columns(start, 512)


def test_two_levels_from_codes(make_weight):
    """Groups that are all padding are filled up, and need no super scale of their own."""
    whole = make_weight(7, 513, 32, "affine", torch.int8)
    parts = {name: tensor.t().contiguous().t() for name, tensor in whole.tensors().items() if name != "packed"}
    parts["scales"], parts["minimum"] = parts["scales"][:17], parts["minimum"][:17]
    weight = Int4Weight.from_codes(unpack(whole.packed, 513), group_size=32, **parts)
    assert weight.scales.shape == (18, 7) and weight.super_scales.shape == (3, 7)
    assert all(tensor.is_contiguous() for tensor in weight.tensors().values())
    assert torch.equal(decode(weight), decode(whole))
