"""Compiled small operations against plain torch and float64, for each instruction set: shapes, layouts, sizes."""

import functools

import pytest
import torch
from small_operations import check, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mebp_triton.kernels import native, native_rows, reference
from mebp_triton.kernels.native_rows import gated_activation, rms_norm, rope, takes_gate, takes_norm, takes_rope

STYLES, KINDS = ("twice", "offset"), ("silu", "gelu_tanh")
# (B, heads of q, heads of k, T, D, R)
ROTATIONS = (
    (2, 4, 2, 5, 16, 16),
    (1, 3, 1, 1, 24, 24),
    (2, 2, 2, 3, 11, 10),
    (1, 1, 1, 4, 6, 2),
    (1, 9, 3, 90, 64, 64),
)


@pytest.fixture(params=native.available()[1:], autouse=True)
def compiled(request):
    with native.using(request.param):
        yield


class Seeing(TorchDispatchMode):
    """Sees operations, as what records a block does: ``names`` has theirs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def norms(style, eps=1e-5):
    return tuple(functools.partial(one, eps=eps, style=style) for one in (rms_norm, reference.rms_norm))


def gates(kind):
    return tuple(functools.partial(one, kind=kind) for one in (gated_activation, reference.gated_activation))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(5, 96), (1, 3), (2, 3, 4, 16), (3, 2, 577), (7,), (300, 577)], ids=str)
def test_norms(normal, style, shape):
    found = check(*norms(style), [normal(*shape)], [normal(shape[-1], seed=2)])
    assert all(one.is_contiguous() for one in found)


@pytest.mark.parametrize(("eps", "size"), [(1e-5, 1e-3), (0.1, 1.0), (1e-5, 1e4)])
def test_magnitudes_of_norms(normal, eps, size):
    check(*norms("twice", eps), [normal(6, 64) * size], [normal(64, seed=2)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 96), (1, 3), (2, 3, 577), (50,), (300, 1000)], ids=str)
def test_gates(normal, kind, shape):
    check(*gates(kind), [4 * normal(*shape), normal(*shape, seed=2)])


@pytest.mark.parametrize("kind", KINDS)
def test_gates_far_from_zero(kind):
    ends = torch.tensor([-1e12, -200.0, -90.0, -87.5, -1e-30, 0.0, 1e-30, 87.5, 90.0, 200.0, 1e12])
    found, wanted = (results(one, [ends, torch.ones(11)], []) for one in gates(kind))
    for own, torchs in zip(found, wanted, strict=True):
        assert torch.allclose(own, torchs, rtol=1e-6, atol=1e-30)
    assert gated_activation(torch.full((40,), torch.nan), torch.ones(40), kind).isnan().all()


@pytest.mark.parametrize("sizes", ROTATIONS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_rotations(normal, sizes, shared):
    batch, heads_q, heads_k, tokens, columns, rotary = sizes
    q, k = (normal(batch, tokens, n, columns, seed=n).transpose(1, 2) for n in (heads_q, heads_k))
    cos, sin = (normal(1 if shared else batch, tokens, rotary, seed=seed) for seed in (30, 40))
    found = check(rope, reference.rope, [q, k], [cos, sin])
    assert all(map(torch.equal, found[:2], results(reference.rope, [q, k], [cos, sin])[:2]))
    assert all(one.transpose(1, 2).is_contiguous() for one in found)
    found = check(rope, reference.rope, [q.contiguous(), k[..., ::1]], [cos.expand(batch, -1, -1), sin])
    assert all(one.isfinite().all() for one in found)


def test_strides(normal):
    wide = normal(20, 64)
    for x in (wide[::2, 8:40], wide[:, ::2], wide.t(), wide[:1].expand(9, 64), wide.view(2, 10, 4, 16).transpose(1, 2)):
        check(*norms("twice"), [x], [normal(2 * x.shape[-1], seed=2)[::2]])
        check(*gates("silu"), [x, normal(*x.shape[:-1], 3 * x.shape[-1], seed=2)[..., ::3]])


def test_results_do_not_depend_on_threads(normal):
    x, weight, gate, up = normal(900, 576), normal(576), normal(900, 576, seed=2), normal(900, 576, seed=3)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(results(norms("once")[0], [x], [weight]) + results(gates("silu")[0], [gate, up], []))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_nothing_to_compute():
    x = torch.empty(0, 3, 16).requires_grad_(True)
    for y in (rms_norm(x, torch.ones(16), 1e-5), gated_activation(x, x)):
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.shape == dx.shape == x.shape
    q = torch.empty(1, 2, 0, 8)
    assert rope(q, q, torch.empty(1, 0, 8), torch.empty(1, 0, 8))[0].shape == q.shape


def test_what_sees_operations_sees_one_with_the_same_result(normal):
    x, weight, q, angles = normal(9, 64), normal(64), normal(1, 2, 3, 16), normal(1, 3, 16)

    def everything():
        found = results(norms("once")[0], [x], [weight]) + results(gates("silu")[0], [x, x], [])
        return found + results(rope, [q, q], [angles, angles])

    with Seeing() as seeing:
        found = everything()
    assert all(map(torch.equal, found, everything()))
    assert {name: seeing.names.count(name) for name in set(seeing.names) if "mebp" in name} == {
        f"mebp_triton::native_{name}": 2 for name in ("norm", "gate", "rotate")
    }


def test_what_is_taken(normal):
    x, weight = normal(3, 16), normal(16)
    q, cos = normal(1, 2, 3, 16), normal(1, 3, 16)
    assert takes_norm(x, weight) and takes_gate(x, x, "silu") and takes_rope(q, q, cos, cos)
    assert not takes_gate(x, x, "gelu")  # by erf
    narrow = [one.bfloat16() for one in (x, weight, q, cos)]
    assert not takes_norm(*narrow[:2]) and not takes_gate(narrow[0], narrow[0], "silu")
    assert not takes_rope(narrow[2], narrow[2], cos, cos)
    with FakeTensorMode() as mode:
        assert takes_norm(mode.from_tensor(x), mode.from_tensor(weight))
    with native.using("off"):
        assert not takes_norm(x, weight) and not takes_gate(x, x, "silu") and not takes_rope(q, q, cos, cos)


def test_transforms_of_functions_and_forward_mode_are_left_to_torch(normal):
    x, weight = normal(3, 16), normal(16)
    taken = []

    def function(x):
        taken.append(takes_norm(x, weight) or takes_gate(x, x, "silu"))
        return reference.rms_norm(x, weight, 1e-5)

    for transformed in (torch.func.grad(lambda x: function(x).sum()), torch.func.functionalize(function)):
        transformed(x)
    torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))
    assert taken == [False] * 4 and takes_norm(x, weight)


def test_the_numbers_of_the_c_code():
    assert native_rows._JOB.size == 8 * (6 + 4 + 4 + 2 + 4 + 6 + 4)
