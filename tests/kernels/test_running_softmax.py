"""The running softmax in plain torch, and the chain of factors that a model applies to its logits."""

import pytest
import torch

from mebp_triton.kernels.running_softmax import RunningSoftmax, apply_chain

CHAINS = {
    "plain": (1.0,),
    "scale": (0.4,),
    "softcap": (1 / 3, 3.0),
    "scaled-softcap": (0.5 / 3, 3.0 * 2),
    "two-tanh": (0.5, 2.0, 1.5),
    "negative": (-0.7,),
}


@pytest.mark.parametrize("factors", CHAINS.values(), ids=CHAINS)
def test_slope_of_the_chain(normal, factors):
    z = normal(4, 5, dtype=torch.float64).requires_grad_(True)
    value = z * factors[0]
    for factor in factors[1:]:
        value = torch.tanh(value) * factor
    (truth,) = torch.autograd.grad(value.sum(), z)
    found, slope = apply_chain(z.detach().clone(), factors)
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(torch.full_like(found, factors[0]) if slope is None else slope, truth)


@pytest.mark.parametrize("widths", [(37,), (1, 1, 35), (20, 17)], ids=str)
@pytest.mark.parametrize("with_slope", [False, True])
def test_tiles_are_taken_in_one_by_one(normal, device, widths, with_slope):
    z, slope = normal(5, 37, dtype=torch.float64) * 8, normal(5, 37, dtype=torch.float64, seed=2)
    targets = torch.tensor([0, 36, widths[0] - 1, widths[0] % 37, 18], device=device)
    softmax = RunningSoftmax(targets, torch.float64, 1.5)
    weights = torch.zeros(5, 0, dtype=torch.float64, device=device)
    start = 0
    for width in widths:
        part = slice(start, start + width)
        p, shrink = softmax.update(z[:, part].clone(), slope[:, part] if with_slope else None, start)
        weights = torch.cat((weights * shrink, p), dim=1)
        start += width
    rows = torch.arange(5, device=device)
    torch.testing.assert_close(weights / softmax.total, z.softmax(dim=1))
    torch.testing.assert_close((softmax.maximum + softmax.total.log()).squeeze(1), z.logsumexp(dim=1))
    assert torch.equal(softmax.at_target.squeeze(1), z[rows, targets])
    assert torch.equal(softmax.argmax.squeeze(1), z.argmax(dim=1))
    wanted = slope[rows, targets] if with_slope else torch.full_like(z[:, 0], 1.5)
    assert torch.equal(softmax.target_slope.squeeze(1), wanted)


def test_the_first_of_equal_logits_is_the_argmax(device):
    softmax = RunningSoftmax(torch.tensor([0], device=device), torch.float32, 1.0)
    for start in (0, 2):
        softmax.update(torch.tensor([[2.0, 2.0]], device=device), None, start)
    assert softmax.argmax.item() == 0
