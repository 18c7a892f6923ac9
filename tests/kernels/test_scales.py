"""Scales of spans of columns: what is fitted is what a weight stores, and columns round one by one as all at once."""

import pytest
import torch
from pairs import pairs

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.scales import fit_scales

DTYPES = [torch.float16, torch.float32, torch.int8]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("form", "dtype", "columns"), pairs(FORMS, DTYPES, [64, 300, 512]), ids=str)
def test_a_span_rounds_to_what_its_weight_decodes_to(form, dtype, columns):
    values = normal(5, columns, seed=columns)
    scales = fit_scales(values, form, dtype)
    codes, decoded = scales.round(values)
    weight = scales.weight(codes)
    assert weight.form == form and weight.scales.dtype == dtype
    assert torch.equal(decode(weight, torch.float32), decoded)


@pytest.mark.parametrize(("form", "dtype"), pairs(FORMS, DTYPES), ids=str)
def test_columns_round_one_by_one_as_all_at_once(form, dtype):
    values = normal(6, 300)
    scales = fit_scales(values, form, dtype)
    codes, decoded = scales.round(values)
    levels = scales.levels()
    for column in (0, 31, 130, 299):
        one = levels.group(column // form.group_size).round(values[:, column : column + 1])
        assert torch.equal(one[0], codes[:, column : column + 1])
        assert torch.equal(one[1], decoded[:, column : column + 1])


@pytest.mark.parametrize(("form", "dtype"), pairs(FORMS, DTYPES), ids=str)
def test_spans_do_not_depend_on_each_other(form, dtype):
    """Scales fitted to stretches of 256 columns, side by side, are those of the matrix."""
    values, importance = normal(6, 600), normal(600, seed=1).square()
    whole, _ = quantize_matrix(values, *form[:2], True, dtype, form.bits, importance)
    parts = [
        fit_scales(values[:, start : start + 256], form, dtype, importance[start : start + 256])
        for start in (0, 256, 512)
    ]
    for name in ("scales", "minimum", "super_scales", "super_minimum"):
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is not None:
            joined = torch.cat(tensors)
            assert torch.equal(joined, getattr(whole, name)[: len(joined)]), name


@pytest.mark.parametrize("affine", [False, True])
def test_weights_of_two_levels_come_back(affine):
    """As Q4_K and Q6_K have them: where all bytes and codes are in use, the fit finds them again."""
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(40, 127, (16, 24), generator=generator).to(torch.int8)
    bytes_[::8] = 127
    supers = (normal(2, 24).abs() * 1e-3 + 1e-4).half()
    codes = torch.randint(0, 16, (24, 512), dtype=torch.uint8, generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    minimum = {"minimum": -bytes_, "super_minimum": 8 * supers} if affine else {}
    source = Int4Weight.from_codes(codes, bytes_, 32, super_scales=supers, **minimum)
    weight = decode(source, torch.float32)
    again, error = quantize_matrix(weight, source.scheme, 32, scale_dtype=torch.int8)
    # The super scale is refitted to float16, 11 bits.
    assert error < 1e-3 and again.two_level


def test_a_fit_follows_importance_of_its_own_columns():
    values, importance = normal(40, 64), torch.ones(64)
    importance[32:40] = 50.0
    form = next(form for form in FORMS if form.group_size == 32)
    even, weighted = fit_scales(values, form, torch.float16), fit_scales(values, form, torch.float16, importance)
    assert torch.equal(even.scales[0], weighted.scales[0])
    assert not torch.equal(even.scales[1], weighted.scales[1])


@pytest.mark.parametrize("form", [form for form in FORMS if form.scheme != "affine"], ids=str)
def test_a_super_scale_among_the_least_float16_numbers_is_rounded_up(form):
    """Rounded to the nearest one it would be too small, or 0, and bytes could not make up for that."""
    values = normal(32, 256).clamp(-3, 3)
    values *= (2.0 ** torch.linspace(-15.9, -12, 32)[:, None]) / values.abs().amax(1, keepdim=True)
    weight, _ = quantize_matrix(values, *form[:2], scale_dtype=torch.int8, bits=form.bits)
    exact, _ = quantize_matrix(values, *form[:2], scale_dtype=torch.float32, bits=form.bits)
    assert weight.two_level
    errors = [(decode(one, torch.float32) - values).norm(dim=1) for one in (weight, exact)]
    bound = 1.2 * errors[1] + 0.02 * values.norm(dim=1)
    assert bool((errors[0] < bound).all()), (errors[0] / bound).max()
