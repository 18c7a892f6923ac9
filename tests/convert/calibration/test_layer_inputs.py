"""Sums of products of inputs, and the change of a layer's output that follows from them."""

import pytest
import torch

from mebp_triton.convert.calibration.layer_inputs import LayerInputs


def test_sums_are_over_all_tokens_of_all_calls():
    calls = [torch.randn(2, 5, 8), torch.randn(7, 8)]
    rows = torch.cat([call.reshape(-1, 8) for call in calls]).double()
    whole, squares = LayerInputs(8), LayerInputs(8, whole=False)
    for call in calls:
        whole.add(call)
        squares.add(call)
    assert whole.tokens == squares.tokens == 17 and whole.whole and not squares.whole
    torch.testing.assert_close(whole.sums.double(), rows.t() @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.sums.double(), rows.square().sum(0), rtol=1e-5, atol=1e-5)


def test_the_output_error_is_that_of_the_outputs():
    x, exact = torch.randn(40, 8), torch.randn(6, 8)
    rounded = exact + 0.01 * torch.randn(6, 8)
    inputs = LayerInputs(8)
    inputs.add(x)
    change = (x @ (rounded - exact).t()).square().sum() / (x @ exact.t()).square().sum()
    assert inputs.output_error(exact, rounded) == pytest.approx(float(change), rel=1e-4)
    assert inputs.output_error(torch.zeros(6, 8), torch.zeros(6, 8)) == 0


def test_without_pairs_columns_count_as_uncorrelated():
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    whole, squares = LayerInputs(3), LayerInputs(3, whole=False)
    whole.add(x)
    squares.add(x)
    exact, rounded = torch.ones(2, 3), torch.ones(2, 3) + torch.tensor([0.1, 0.0, -0.2])
    assert squares.output_error(exact, rounded) == pytest.approx(whole.output_error(exact, rounded))
