"""Rounding that makes up for its errors changes what a layer gives less than plain rounding does."""

import pytest
import torch

from mebp_triton.kernels.compensation import STRETCH, compensation
from mebp_triton.kernels.layout import unpack
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode

COLUMNS = 300  # neither whole groups nor whole stretches


def correlated(columns=COLUMNS, seed=0):
    """The sum of products of inputs whose columns are alike, and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(1000, columns, generator=generator) @ mixed
    inputs *= torch.rand(columns, generator=generator).mul(3).exp()
    return inputs.t() @ inputs


def matrix(rows=24, columns=COLUMNS, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def output_error(weight, exact, products):
    change = decode(weight) - exact.double()
    return float((change @ products.double() * change).sum())


def test_the_factor_is_that_of_the_damped_inverse():
    products = correlated(40)
    factor = compensation(products, 0.2, 0.1).double()
    assert torch.equal(factor, factor.triu())
    scaled = products.double() / products.diagonal().double().mean()
    damped = scaled + torch.diag(0.2 * scaled.diagonal() + 0.1)
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("power", [-110, 0, 127])
def test_the_scale_of_the_inputs_makes_no_difference(power):
    """The sum of the largest diagonal is more than float32 holds."""
    products = correlated(40)
    products /= products.max()
    torch.testing.assert_close(compensation(products * 2.0**power), compensation(products), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_change_less(form, scale_dtype):
    products, exact = correlated(), matrix()
    options = {"bits": form.bits, "scale_dtype": scale_dtype, "importance": products.diagonal().clone()}
    plain, _ = quantize_matrix(exact, *form[:2], **options)
    made, error = quantize_matrix(exact, *form[:2], **options, factor=compensation(products))
    assert made.form == form and made.scales.dtype == scale_dtype
    assert output_error(made, exact, products) < 0.8 * output_error(plain, exact, products)
    assert error == pytest.approx(float((decode(made) - exact).norm() / exact.norm()), rel=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_uncorrelated_columns_are_rounded_as_ever(form):
    """Columns with nothing in common cannot make up for each other, whatever their sizes."""
    exact, sizes = matrix(), torch.rand(COLUMNS) + 0.5
    plain, _ = quantize_matrix(exact, *form[:2], bits=form.bits, importance=sizes)
    made, _ = quantize_matrix(
        exact, *form[:2], bits=form.bits, importance=sizes, factor=compensation(torch.diag(sizes))
    )
    for name, tensor in plain.tensors().items():
        assert torch.equal(getattr(made, name), tensor), name


def test_each_column_takes_the_errors_of_those_on_its_left():
    """Scales are given by one large column in each group, so only the codes can differ from a loop in float64."""
    size, products = 32, correlated(96)
    exact = matrix(8, 96)
    exact[:, ::size] = 0.7
    made, _ = quantize_matrix(exact, "symmetric", size, scale_search=False, factor=compensation(products))
    factor, left = compensation(products).double(), exact.double()
    for column in range(96):
        scale = made.scales[column // size].double()
        rounded = (left[:, column] / scale).round().clamp(-8, 7) * scale
        error = (left[:, column] - rounded) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        left[:, column] = rounded
    assert float((decode(made) - left).abs().max()) < 1e-6


def test_rows_do_not_depend_on_each_other(monkeypatch):
    from mebp_triton.kernels import quantize

    exact, factor = matrix(), compensation(correlated())
    whole, error = quantize_matrix(exact, "affine", 32, factor=factor)
    monkeypatch.setattr(quantize, "COMPENSATED_ELEMENTS", 5 * COLUMNS)
    parts, same = quantize_matrix(exact, "affine", 32, factor=factor)
    # A product's last bit depends on the number of rows, and may decide between two fits that are as good.
    equal_codes = unpack(parts.packed, COLUMNS) == unpack(whole.packed, COLUMNS)
    assert equal_codes.float().mean() > 0.98 and same == pytest.approx(error, rel=1e-3)


def test_a_column_without_input_is_rounded_as_it_is():
    products, exact = correlated(), matrix()
    silent = [3, STRETCH, 64]
    products[silent] = products[:, silent] = 0
    made, _ = quantize_matrix(exact, "symmetric", 32, importance=products.diagonal(), factor=compensation(products))
    steps = made.float_scales().t().repeat_interleave(32, 1)[:, silent]
    nearest = (exact[:, silent] / steps).round().clamp(-8, 7) * steps
    torch.testing.assert_close(decode(made, torch.float32)[:, silent], nearest)


def test_no_input_at_all_is_plain_rounding():
    exact = matrix()
    made, _ = quantize_matrix(exact, "affine", 64, factor=compensation(torch.zeros(COLUMNS, COLUMNS)))
    assert torch.equal(made.packed, quantize_matrix(exact, "affine", 64)[0].packed)


def test_what_does_not_fit_is_refused():
    products = correlated(40)
    products[3, 4] = float("inf")
    with pytest.raises(ValueError, match="inputs on the calibration text are not finite"):
        compensation(products)
    with pytest.raises(
        ValueError, match=r"factor must be float32 of shape \(300, 300\), got torch.float32 of \(40, 40\)"
    ):
        quantize_matrix(matrix(), factor=torch.eye(40))
