"""Quantization errors against bounds and a brute-force search, and matrices whose scales need care."""

import pytest
import torch
from pairs import pairs

from mebp_triton.kernels import quantize
from mebp_triton.kernels.group_fit import NF4
from mebp_triton.kernels.layout import Int4Weight, unpack
from mebp_triton.kernels.names import FORMS, GROUP_SIZES, SCHEMES, Form
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode

ROWS, COLUMNS = 96, 512

# Slightly above the errors measured with seed 0: (with search, without).
BOUNDS = {
    ("symmetric", 32): (0.084, 0.098),
    ("symmetric", 64): (0.093, 0.109),
    ("symmetric", 128): (0.101, 0.119),
    ("affine", 32): (0.073, 0.079),
    ("affine", 64): (0.084, 0.091),
    ("affine", 128): (0.094, 0.101),
    ("codebook", 32): (0.080, 0.088),
    ("codebook", 64): (0.086, 0.093),
    ("codebook", 128): (0.091, 0.097),
}
BOUNDS_OF_8_BITS = {
    ("symmetric", 16): (0.0043, 0.0048),
    ("symmetric", 32): (0.0051, 0.0054),
    ("symmetric", 64): (0.0057, 0.0060),
    ("symmetric", 128): (0.0064, 0.0066),
    ("affine", 16): (0.0037, 0.0039),
    ("affine", 32): (0.0045, 0.0047),
    ("affine", 64): (0.0052, 0.0053),
    ("affine", 128): (0.0059, 0.0060),
}
EIGHT_BITS = [form for form in FORMS if form.bits == 8]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(quantized, weight):
    return float((decode(quantized) - weight.double()).norm() / weight.double().norm())


def equal(a: Int4Weight, b: Int4Weight):
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(params=GROUP_SIZES)
def group_size(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["search", "plain"])
def search(request):
    return request.param


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_error_bounds(scheme, group_size, scale):
    weight = normal(ROWS, COLUMNS) * scale
    searched, plain = (quantize_matrix(weight, scheme, group_size, search)[1] for search in (True, False))
    bounds = BOUNDS[scheme, group_size]
    assert searched <= bounds[0] and plain <= bounds[1]
    assert searched < 0.96 * plain


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("form", EIGHT_BITS, ids=str)
def test_error_bounds_of_8_bits(form, scale):
    weight = normal(ROWS, COLUMNS) * scale
    searched, plain = (quantize_matrix(weight, *form[:2], search, bits=8)[1] for search in (True, False))
    bounds = BOUNDS_OF_8_BITS[form[:2]]
    assert searched <= bounds[0] and plain <= bounds[1] and searched < plain


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_reported_error_is_that_of_the_decoded_weight(form, search):
    weight = normal(7, 300)
    quantized, error = quantize_matrix(weight, *form[:2], search, bits=form.bits)
    assert error == pytest.approx(relative_error(quantized, weight), rel=1e-6, abs=1e-7)
    assert Form(quantized.scheme, quantized.group_size, quantized.bits) == form and quantized.shape == (7, 300)
    assert quantized.scales.dtype == torch.float16


def test_defaults():
    weight = normal(4, 128)
    assert equal(quantize_matrix(weight)[0], quantize_matrix(weight, "symmetric", 64, True, torch.float16)[0])


@pytest.mark.parametrize("form", [form for form in FORMS if form.group_size == 64], ids=str)
def test_codes_are_the_nearest(form, search):
    """With the stored scale, no other code of any element is nearer."""
    weight = normal(9, 200)
    quantized, _ = quantize_matrix(weight, form.scheme, 64, search, bits=form.bits)
    distance = (decode(quantized) - weight.double()).abs()
    for code in range(2**form.bits):
        byte = torch.full_like(quantized.packed, code * 17 if form.bits == 4 else code)
        other = decode(Int4Weight(**{**vars(quantized), "packed": byte}))
        assert (distance <= (other - weight.double()).abs() + 1e-6).all()


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (8, 127)])
def test_plain_symmetric_is_absmax_over_the_largest_level(bits, top):
    weight = normal(5, 128)
    quantized, _ = quantize_matrix(weight, scale_search=False, bits=bits)
    expected = (weight.view(5, 2, 64).abs().amax(2) / top).half().t()
    assert torch.equal(quantized.scales, expected)
    levels = (weight.view(5, 2, 64) / expected.t().float()[:, :, None]).round().clamp(-top - 1, top).view(5, 128)
    assert torch.equal(unpack(quantized.packed, 128), (levels + top + 1).to(torch.uint8))


@pytest.mark.parametrize(("bits", "top"), [(4, 15), (8, 255)])
def test_plain_affine_is_minimum_to_maximum(bits, top):
    weight = normal(5, 64)
    quantized, _ = quantize_matrix(weight, "affine", 64, scale_search=False, bits=bits)
    low, high = weight.aminmax(dim=1)
    assert torch.equal(quantized.minimum[0], low.half())
    torch.testing.assert_close(quantized.scales[0].float(), (high - low) / top, rtol=1e-3, atol=0)
    codes = unpack(quantized.packed, 64)
    assert (codes.amin(1) <= bits // 8).all() and (codes.amax(1) >= top - bits // 8).all()


def test_plain_codebook_is_absmax():
    weight = normal(5, 64)
    quantized, _ = quantize_matrix(weight, "codebook", 64, scale_search=False)
    assert torch.equal(quantized.scales[0], weight.abs().amax(1).half())
    assert torch.equal(quantized.codebook, NF4)


def test_symmetric_peak_may_be_code_zero():
    """A group whose one large weight is positive takes a negative scale, so that it can use the level -8."""
    weight = normal(16, 64) * 0.2
    weight[:, 5] = 1.0
    quantized, _ = quantize_matrix(weight, "symmetric", 64)
    assert (quantized.scales < 0).any()
    assert (unpack(quantized.packed, 64)[:, 5] == 0).any()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", EIGHT_BITS, ids=str)
def test_decoded_weights_of_8_bits_come_back(form, scale_dtype):
    """Both ends of the levels are in use, so the search finds the grid."""
    scheme, size, bits = form
    codes = torch.randint(0, 256, (24, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[:, ::16], codes[:, 1::16] = 0, 255
    scales = (normal(256 // size, 24).abs() * 0.005 + 0.001).to(scale_dtype)
    minimum = (-100 * scales.float()).to(scale_dtype) if scheme == "affine" else None
    weight = decode(Int4Weight.from_codes(codes, scales, size, minimum, bits=bits), torch.float32)
    again, error = quantize_matrix(weight, scheme, size, scale_dtype=scale_dtype, bits=bits)
    assert error < (2e-3 if scheme == "affine" else 1e-6)


@pytest.mark.parametrize("own", SCHEMES)
def test_decoded_weights_come_back(own, group_size):
    """For a matrix that has 16 levels already, the search finds these levels again."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 256), dtype=torch.uint8, generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # as in Q4_1: both ends are in use
    scales = (normal(256 // group_size, 24).abs() * 0.05 + 0.01).half()
    source = Int4Weight.from_codes(
        codes,
        scales,
        group_size,
        minimum=(-8 * scales + 0.01).half() if own == "affine" else None,
        codebook=NF4 if own == "codebook" else None,
    )
    weight = decode(source, torch.float32)
    again, error = quantize_matrix(weight, own, group_size)
    assert error < 1e-3
    assert float((decode(again) - weight).abs().max()) < 1e-3 * float(weight.abs().max())
    # The levels of another scheme cannot represent it.
    other = "symmetric" if own != "symmetric" else "codebook"
    assert quantize_matrix(weight, other, group_size)[1] > 0.01


@pytest.mark.parametrize(
    ("columns", "form", "search"),
    pairs([1, 31, 32, 33, 63, 65, 96, 100, 127, 129, 200], FORMS, [True, False]),
    ids=str,
)
def test_partial_groups(form, search, columns):
    """Full groups are those of the matrix without its remainder, which is fitted to its own values only."""
    scheme, group_size, bits = form
    weight = normal(5, columns, seed=columns) + 6.0
    quantized, error = quantize_matrix(weight, scheme, group_size, search, bits=bits)
    assert error == pytest.approx(relative_error(quantized, weight), rel=1e-6, abs=1e-7) and error < 0.12
    full = columns // group_size * group_size
    if full:
        whole, _ = quantize_matrix(weight[:, :full].contiguous(), scheme, group_size, search, bits=bits)
        assert torch.equal(decode(quantized)[:, :full], decode(whole))
    if full < columns and scheme == "affine":
        # Zeros as padding would stretch the range from 6 down to 0.
        assert (quantized.minimum[full // group_size] > 0).all()


def test_chunks_do_not_change_the_result(scheme, monkeypatch):
    weight = normal(37, 200)
    whole, error = quantize_matrix(weight, scheme)
    for elements in (1, 450, 4000):
        monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", elements)
        chunked, chunked_error = quantize_matrix(weight, scheme)
        assert equal(whole, chunked) and chunked_error == pytest.approx(error, rel=1e-12)


def test_deterministic_and_the_input_is_untouched(scheme):
    weight = normal(33, 300)
    before = weight.clone()
    first, second = quantize_matrix(weight, scheme)[0], quantize_matrix(weight, scheme)[0]
    assert equal(first, second) and torch.equal(weight, before)


def test_strides_and_dtypes(scheme):
    weight = normal(96, 40)
    assert equal(quantize_matrix(weight.t(), scheme)[0], quantize_matrix(weight.t().contiguous(), scheme)[0])
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(dtype)
        assert equal(quantize_matrix(narrow, scheme)[0], quantize_matrix(narrow.float(), scheme)[0])


def test_float32_scales(scheme, search):
    weight = normal(8, 128)
    quantized, error = quantize_matrix(weight, scheme, 64, search, torch.float32)
    assert quantized.scales.dtype == torch.float32
    assert error == pytest.approx(quantize_matrix(weight, scheme, 64, search)[1], rel=0.01)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
def test_zeros(form, search, scale_dtype):
    weight = torch.zeros(3, 100)
    quantized, error = quantize_matrix(weight, *form[:2], search, scale_dtype, form.bits)
    assert error == 0.0 and torch.equal(decode(quantized), weight.double())
    assert all(tensor.isfinite().all() for tensor in quantized.tensors().values())
    weight[1, 70] = 1.0
    quantized, error = quantize_matrix(weight, *form[:2], search, scale_dtype, form.bits)
    decoded = decode(quantized)
    assert (decoded[0] == 0).all() and (decoded[2] == 0).all()
    assert decoded[1, 70] == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("value", [-0.3, 0.3, 7.0, -1e-3])
def test_constant_groups(scheme, search, value):
    quantized, error = quantize_matrix(torch.full((2, 70), value), scheme, 64, search)
    assert error < 1e-3 and all(tensor.isfinite().all() for tensor in quantized.tensors().values())


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-12, 1e-7, 1e-6, 1e5, 1e20, 1e37])
def test_float32_scales_where_float16_cannot_hold_them(scheme, search, magnitude):
    """Squares of these magnitudes under- or overflow, but the error must be that of a normal matrix."""
    weight = normal(4, 128) * magnitude
    quantized, error = quantize_matrix(weight, scheme, 64, search)
    assert quantized.scales.dtype == torch.float32
    assert quantized.scales.isfinite().all() and 0.05 < error < 0.13


@pytest.mark.parametrize("magnitude", [2e-5, 1e-3, 1.0, 7000.0])
def test_float16_scales_where_it_can(scheme, magnitude):
    quantized, error = quantize_matrix((normal(4, 128) * magnitude).clamp(-32768, 32768), scheme, 64)
    assert quantized.scales.dtype == torch.float16 and quantized.scales.isfinite().all() and 0.05 < error < 0.13


def test_one_tiny_row_is_kept(scheme):
    weight = normal(6, 128)
    weight[4] *= 1e-8
    quantized, _ = quantize_matrix(weight, scheme)
    assert quantized.scales.dtype == torch.float32
    assert relative_error(quantized.rows(4, 5), weight[4:5]) < 0.13


@pytest.mark.parametrize(("spread", "scale_dtype"), [(8.0, torch.float16), (0.02, torch.float32)])
def test_affine_far_from_zero(search, spread, scale_dtype):
    """Sums of products with 1000 would drown the small spread."""
    weight = normal(4, 128) * spread + 1000
    quantized, _ = quantize_matrix(weight, "affine", 64, search, scale_dtype)
    residual = (decode(quantized) - weight).norm() / (weight - weight.mean(1, keepdim=True)).norm()
    assert float(residual) < 0.1


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_two_levels_lose_hardly_anything(form, search):
    """A byte for each group, and the codes are the nearest by the scales that it gives."""
    weight = normal(48, 600) * normal(48, 600).exp()
    error = quantize_matrix(weight, *form[:2], search, bits=form.bits)[1]
    two, of_two = quantize_matrix(weight, *form[:2], search, torch.int8, form.bits)
    assert two.two_level and two.form == form
    assert of_two == pytest.approx(relative_error(two, weight), rel=1e-6, abs=1e-7)
    # A minimum is rounded to half a step of 8 bits.
    most = 1.6 if form.bits == 8 and form.scheme == "affine" else 1.03
    assert of_two < error * (most if search else 1.2 * most)


@pytest.mark.parametrize("magnitude", [2e-5, 3e-4, 1.0, 7000.0])
def test_two_levels_where_float16_can_hold_them(scheme, magnitude):
    """The least super scales are few steps of float16, and no byte may overflow where one was rounded down."""
    weight = (normal(8, 512) * magnitude).clamp(-32768, 32768)
    weight, error = quantize_matrix(weight, scheme, 64, scale_dtype=torch.int8)
    assert weight.two_level and weight.super_scales.isfinite().all() and 0.05 < error < 0.13


def test_two_levels_where_float16_cannot_hold_them(scheme):
    weight, error = quantize_matrix(normal(4, 128) * 1e-7, scheme, 64, scale_dtype=torch.int8)
    assert weight.scales.dtype == torch.float32 and not weight.two_level and error < 0.13


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_non_finite_weights(bad, dtype):
    weight = normal(6, 70).to(dtype)
    weight[4, 69] = bad
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in row 4$"):
        quantize_matrix(weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "nf4"}, "symmetric.*affine.*codebook.*got 'nf4'"),
        ({"group_size": 48}, "32, 64, 128.*got 48"),
        ({"group_size": 16}, "32, 64, 128, got 16 for codes of 4 bits; it goes with 8 bits"),
        ({"group_size": 8, "bits": 8}, "16, 32, 64, 128, got 8 for codes of 8 bits$"),
        ({"bits": 6}, "bits must be one of 4, 8, got 6"),
        ({"bits": 8.0}, "bits must be one of 4, 8, got 8.0"),
        ({"bits": 8, "scheme": "codebook"}, "the codebook scheme has 4 bits"),
        ({"scale_dtype": torch.bfloat16}, "float16.*float32.*got torch.bfloat16"),
        ({"scale_dtype": torch.uint8}, "float16.*float32.*int8.*got torch.uint8"),
        ({"importance": torch.ones(63)}, "float32 of shape .64,.*got torch.float32 of .63,"),
        ({"importance": torch.ones(64).double()}, "got torch.float64"),
        ({"importance": -torch.ones(64)}, "finite and at least 0"),
        ({"importance": torch.full((64,), torch.inf)}, "finite and at least 0"),
        ({"weight": normal(4, 64).to(torch.int32)}, "bfloat16.*got torch.int32"),
        ({"weight": normal(64)}, "matrix .N, K. .*64"),
        ({"weight": normal(0, 64)}, "not empty"),
        ({"weight": normal(4, 0)}, "not empty"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize_matrix(**{"weight": normal(4, 64), **arguments})
    assert "\n" not in str(caught.value)


def test_works_in_chunks_of_rows(monkeypatch):
    """No step gets more than a chunk of rows at once."""
    assert quantize.CHUNK_ELEMENTS * 4 <= 4 << 20
    seen = []
    original = quantize._quantize_rows

    def spy(rows, *args):
        seen.append(rows.numel())
        return original(rows, *args)

    monkeypatch.setattr(quantize, "_quantize_rows", spy)
    quantize_matrix(normal(900, 1024))
    assert sum(seen) == 900 * 1024 and max(seen) <= quantize.CHUNK_ELEMENTS


def test_rows_are_released_once_they_were_read(monkeypatch):
    """All rows twice: for their peaks, and to be quantized; and after that nobody reads them."""
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 640)
    weight = normal(37, 64)
    expected, places = quantize_matrix(weight.clone(), release=None)[0], []

    def release(rows):
        places.append((rows.data_ptr() - weight.data_ptr()) // (4 * 64))
        if len(places) > 4:
            rows.fill_(torch.nan)

    assert equal(quantize_matrix(weight, release=release)[0], expected)
    assert sorted(places) == sorted([0, 10, 20, 30] * 2) and weight.isnan().all()


def test_threads_do_not_change_the_result(scheme, monkeypatch):
    """Many small chunks on two threads, and torch has as many threads afterwards as before."""
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 1000)
    weight, threads, results = normal(90, 100), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(quantize_matrix(weight, scheme, 32))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    with torch.inference_mode():
        assert equal(quantize_matrix(torch.nn.Parameter(weight), scheme, 32)[0], results[0][0])
    assert not quantize_matrix(torch.nn.Parameter(weight), scheme, 32)[0].scales.requires_grad
