"""The kernel of the running softmax, against the one in plain torch."""

import pytest
import torch
from interpreted import DTYPES
from pairs import pairs

from mebp_triton.kernels.accuracy import judge
from mebp_triton.kernels.running_softmax import RunningSoftmax
from mebp_triton.kernels.softmax_tile import BLOCK_V, update_softmax

pytestmark = pytest.mark.usefixtures("triton_kernels")
NAMES = ("maximum", "total", "at_target", "target_slope", "argmax")


def check(z, slope, targets, widths):
    """Updates both by the same logits, tile by tile, and compares them.

    Probabilities of 16 bits are also held against float64 by the kernels' rule of correctness.
    """
    ours, theirs = (RunningSoftmax(targets, torch.float32, 1.0) for _ in range(2))
    exact = RunningSoftmax(targets, torch.float64, 1.0)
    start = 0
    for width in widths:
        tile = z[:, start : start + width]
        part = None if slope is None else slope[:, start : start + width].contiguous()
        p, shrink = update_softmax(ours, tile.clone(), part, start)
        wanted, wanted_shrink = theirs.update(tile.to(torch.float32, copy=True), part, start)
        assert p.dtype == z.dtype
        truth, _ = exact.update(tile.double(), None if part is None else part.double(), start)
        if z.dtype == torch.float32:
            torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-6)
        else:
            verdict = judge(p, wanted.to(z.dtype), truth)
            assert verdict["ok"], verdict["reason"]
            # The rule judges by the largest probability; small ones have the same relative error.
            torch.testing.assert_close(p.float(), wanted, rtol=torch.finfo(z.dtype).eps, atol=1e-6)
        torch.testing.assert_close(shrink, wanted_shrink)
        for name in NAMES:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
        start += width
    assert start == z.shape[1]
    return ours


@pytest.mark.parametrize(
    ("widths", "with_slope", "dtype"),
    pairs([(37,), (20, 17), (1, 1, 35), (BLOCK_V, 5), (BLOCK_V + 3, 2 * BLOCK_V)], [False, True], DTYPES),
    ids=str,
)
def test_as_in_plain_torch(normal, device, dtype, widths, with_slope):
    total = sum(widths)
    z = normal(5, total, dtype=dtype) * 8
    targets = torch.tensor([0, total - 1, widths[0] - 1, widths[0] % total, total // 2], device=device)
    softmax = check(z, normal(5, total, seed=2) if with_slope else None, targets, widths)
    losses = softmax.maximum + softmax.total.log() - softmax.at_target
    truth = torch.nn.functional.cross_entropy(z.double(), targets, reduction="none")
    torch.testing.assert_close(losses.squeeze(1).double(), truth, rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_logits_is_the_argmax(device):
    z = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]], device=device)
    softmax = check(z, None, torch.tensor([0, 0], device=device), (2, 2))
    assert softmax.argmax.flatten().tolist() == [1, 0]


def test_logits_far_apart(device):
    z = torch.tensor([[-1e4, 0.0, 1e4, -3e4], [5e3, 5e3, -5e3, 0.0]], device=device)
    check(z, None, torch.tensor([2, 1], device=device), (1, 2, 1))


def test_a_nan_shows(device):
    z = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]], device=device)
    softmax = RunningSoftmax(torch.tensor([0, 0], device=device), torch.float32, 1.0)
    update_softmax(softmax, z, None, 0)
    assert softmax.total[0].isnan().all() and softmax.total[1].isfinite().all()
