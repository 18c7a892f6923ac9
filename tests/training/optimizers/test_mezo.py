"""MeZO: the direction is the seeded z, the length the finite difference; memory and randomness stay as they were."""

import itertools

import pytest
import torch
from torch import nn

from mebp_triton.training.optimizers.mezo import MeZO


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in ((3, 4), (5,), ())]


def direction(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in groups]


def quadratic(groups):
    return lambda: float(sum(0.5 * (p - 1).square().sum() for p in groups))


def test_the_step_is_the_projected_gradient_times_the_seeded_direction():
    groups = parameters()
    before = [p.detach().clone() for p in groups]
    z = direction(groups, 7)
    slope = float(sum(((p - 1) * d).sum() for p, d in zip(before, z, strict=True)))
    loss_before = quadratic(groups)()
    mean, projected = MeZO(groups, epsilon=1e-3).step(quadratic(groups), lr=0.01, seed=7)
    assert projected == pytest.approx(slope, rel=1e-9)  # exact for a quadratic
    second = 0.5e-6 * float(sum(d.square().sum() for d in z))
    assert mean == pytest.approx(loss_before + second, rel=1e-12)
    for parameter, old, d in zip(groups, before, z, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.01 * slope * d, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
def test_without_a_rate_the_parameters_come_back(dtype, tolerance):
    groups = parameters(dtype)
    before = [p.detach().clone() for p in groups]
    method = MeZO(groups)
    for seed in range(5):
        method.step(quadratic(groups), lr=0.0, seed=seed)
    for parameter, old in zip(groups, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=5 * tolerance)


def test_the_loss_is_seen_on_both_sides():
    groups = parameters()
    before = [p.detach().clone() for p in groups]
    seen = []

    def loss():
        assert not any(p.grad is not None for p in groups)
        seen.append([p.detach().clone() for p in groups])
        return 0.0

    MeZO(groups, epsilon=0.25).step(loss, lr=0.1, seed=3)
    z = direction(groups, 3)
    assert len(seen) == 2
    for plus, minus, old, d in zip(*seen, before, z, strict=True):
        torch.testing.assert_close(plus, old + 0.25 * d, rtol=0, atol=1e-14)
        torch.testing.assert_close(minus, old - 0.25 * d, rtol=0, atol=1e-14)


def test_it_descends_on_a_quadratic():
    groups = parameters()
    method = MeZO(groups)
    first = quadratic(groups)()
    for seed in range(400):
        method.step(quadratic(groups), lr=0.02, seed=seed)
    assert quadratic(groups)() < 0.01 * first


def test_it_is_a_function_of_the_seeds_and_leaves_the_global_generator_alone():
    runs = []
    for _ in range(2):
        groups = parameters(torch.float32)
        method = MeZO(groups, weight_decay=0.1)
        state = torch.get_rng_state()
        for seed in range(10):
            method.step(quadratic(groups), lr=0.01, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(17)
        runs.append(groups)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = parameters(torch.float32)
    MeZO(other, weight_decay=0.1).step(quadratic(other), lr=0.01, seed=99)
    once = parameters(torch.float32)
    MeZO(once, weight_decay=0.1).step(quadratic(once), lr=0.01, seed=0)
    assert not torch.equal(other[0], once[0])


def test_weight_decay_is_decoupled():
    groups = parameters()
    before = [p.detach().clone() for p in groups]
    MeZO(groups, weight_decay=0.5).step(lambda: 1.0, lr=0.1, seed=0)  # equal losses: no gradient
    for parameter, old in zip(groups, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * 0.95, rtol=0, atol=1e-14)


def test_every_parameter_has_a_direction_of_its_own():
    """One generator for all: two parameters of one shape are not moved alike."""
    twins = [nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))]
    values = itertools.count()
    MeZO(twins).step(lambda: float(next(values)), lr=0.1, seed=0)
    assert twins[0].any() and not torch.equal(twins[0], twins[1])


@pytest.mark.parametrize("epsilon", [0.0, -1e-3, float("nan")])
def test_a_step_of_nothing_is_refused(epsilon):
    with pytest.raises(ValueError, match="mezo epsilon must be positive, got"):
        MeZO(parameters(), epsilon=epsilon)
