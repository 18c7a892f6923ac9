"""The fit of a group's scale against a brute-force search, and what its error counts more."""

import pytest
import torch

from mebp_triton.kernels import group_fit
from mebp_triton.kernels.group_fit import NF4, Fit, Groups
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode

ROWS, COLUMNS = 96, 512


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(decoded, groups):
    extreme = groups.abs() == groups.abs().amax(1, keepdim=True)
    return ((decoded - groups).square() * torch.where(extreme, group_fit.EXTREME_WEIGHT, 1.0)).sum(1)


@pytest.mark.parametrize("levels", [torch.arange(-8.0, 8.0), NF4], ids=["symmetric", "codebook"])
def test_search_is_close_to_the_best_scale(levels):
    """A scan of 4000 scales per group finds hardly anything better."""
    weight = normal(64, 32).double()
    quantized, _ = quantize_matrix(weight.float(), "codebook" if levels is NF4 else "symmetric", 32)
    ours = weighted_error(decode(quantized), weight)
    best = torch.full_like(ours, torch.inf)
    levels = levels.double()
    top = weight.abs().amax(1, keepdim=True) / levels.abs().max()
    for multiple in torch.linspace(-1.5, 1.5, 4001).double():
        scaled = levels * (top * multiple)
        nearest = (weight[:, :, None] - scaled[:, None, :]).abs().argmin(2)
        best = torch.minimum(best, weighted_error(scaled.gather(1, nearest), weight))
    assert float(ours.sum() / best.sum()) < 1.01
    assert float((ours / best).max()) < 1.25


def test_search_keeps_the_extremes():
    """Weighting the extremes makes the error of a group's largest weight smaller than plain least squares does."""
    weight = normal(ROWS, COLUMNS)
    groups = weight.view(-1, 64)
    peak = groups.abs().argmax(1, keepdim=True)

    def peak_error():
        decoded = decode(quantize_matrix(weight)[0], torch.float32).view(-1, 64)
        return float((decoded - groups).gather(1, peak).norm() / groups.gather(1, peak).norm())

    ours = peak_error()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_fit, "EXTREME_WEIGHT", 1.0)
        plain = peak_error()
    assert ours < 0.65 * plain


@pytest.mark.parametrize("form", [form for form in FORMS if form.group_size == 32], ids=str)
def test_refits_keep_the_best(form):
    """No refit makes the weighted error larger, even from a start that no search would choose."""
    groups = Groups(normal(16, 8, 32), form)
    start = Fit(groups.plain().scale * 0.6, groups.plain().minimum)
    errors = []
    for refits in (0, 1, 3):
        fit = groups.refine(start, torch.Tensor.clone, torch.Tensor.clone, refits)
        errors.append(groups._error(groups._nearest(fit), fit))
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert errors[2].sum() < 0.9 * errors[0].sum()


def of_columns(weight, importance, form):
    """The squared error of each column."""
    quantized, _ = quantize_matrix(weight, *form[:2], bits=form.bits, importance=importance)
    return (decode(quantized) - weight).square().sum(0)


@pytest.mark.parametrize("form", [form for form in FORMS if form.group_size == 32], ids=str)
def test_important_columns_have_a_smaller_error(form):
    """Columns in full groups and in a partial last one."""
    weight, importance = normal(200, 70), torch.full((70,), 0.05)
    importance[::8] = 10.0
    even, weighted = of_columns(weight, None, form), of_columns(weight, importance, form)
    for span in (slice(0, 64), slice(64, 70)):
        errors = [(error * importance)[span].sum() for error in (even, weighted)]
        assert errors[1] < (0.9 if form.bits == 4 else 0.97) * errors[0]


@pytest.mark.parametrize("importance", [torch.zeros(96), torch.full((96,), 3e-38), torch.full((96,), 3e38)])
def test_even_importance_changes_nothing(importance):
    weight = normal(8, 96)
    quantized, _ = quantize_matrix(weight, "affine", 32, importance=importance)
    assert torch.equal(decode(quantized), decode(quantize_matrix(weight, "affine", 32)[0]))


@pytest.mark.parametrize("scheme", ["symmetric", "affine", "codebook"])
def test_one_important_column_of_a_group(scheme):
    """The others have no input, but what they decode to stays within the group's range."""
    weight, importance = normal(64, 64), torch.zeros(64)
    importance[[3, 40]] = 1.0
    quantized, _ = quantize_matrix(weight, scheme, 32, importance=importance)
    decoded = decode(quantized)
    even = decode(quantize_matrix(weight, scheme, 32)[0])
    errors = [(matrix - weight)[:, [3, 40]].norm() for matrix in (even, decoded)]
    assert errors[1] < 0.4 * errors[0]
    assert decoded.abs().max() < 1.5 * weight.abs().max()
