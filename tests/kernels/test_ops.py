"""The ``torch.library`` ops: registration, fake implementations, derivatives."""

import pytest
import torch
from pairs import pairs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mebp_triton.kernels import functions, native, ops, reference
from mebp_triton.kernels.functions import (
    int4_cross_entropy,
    int4_embedding,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
)
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.ops import fields_of, shaped

PANEL = "panel"
KINDS = [form for form in FORMS if form.group_size == 32]


@pytest.mark.parametrize(
    ("kind", "dtype", "with_bias", "with_lora"),
    pairs(KINDS, [torch.float32, torch.bfloat16], [False, True], [False, True]),
    ids=str,
)
def test_opcheck_matmul(make_weight, normal, kind, dtype, with_bias, with_lora):
    bias = normal(7, dtype=dtype).requires_grad_(True) if with_bias else None
    t, b = (normal(*s, dtype=dtype).requires_grad_(True) if with_lora else None for s in ((3, 4), (7, 4)))
    x = normal(3, 70, dtype=dtype).requires_grad_(True)
    scale_dtype = torch.int8 if with_bias else torch.float16
    args = (x, *fields_of(make_weight(7, 70, 32, kind.scheme, scale_dtype, bits=kind.bits)), bias, t, b, PANEL)
    torch.library.opcheck(torch.ops.mebp_triton.int4_matmul.default, args)


@pytest.mark.parametrize("with_lora", [False, True])
def test_opcheck_matmul_dx(make_weight, normal, kind, with_lora):
    g, a = (normal(*shape).requires_grad_(True) if with_lora else None for shape in ((3, 4), (4, 70)))
    args = (
        normal(3, 7).requires_grad_(True),
        *fields_of(make_weight(7, 70, 32, kind.scheme, bits=kind.bits)),
        g,
        a,
        PANEL,
    )
    torch.library.opcheck(torch.ops.mebp_triton.int4_matmul_dx.default, args)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_opcheck_embedding(make_weight, kind, device, shape):
    ids = torch.randint(0, 7, shape, device=device)
    args = (ids, *fields_of(make_weight(7, 70, 32, kind.scheme, bits=kind.bits)), torch.bfloat16, PANEL)
    torch.library.opcheck(torch.ops.mebp_triton.int4_embedding.default, args)


@pytest.mark.parametrize(("kind", "need_grad", "with_bias"), pairs(KINDS, [False, True], [False, True]), ids=str)
def test_opcheck_cross_entropy(make_weight, normal, kind, device, need_grad, with_bias):
    targets = torch.tensor([1, -100, 6, 0], device=device)
    bias = normal(7) if with_bias else None
    hidden = normal(4, 70).requires_grad_(need_grad)
    args = (
        hidden,
        *fields_of(make_weight(7, 70, 32, kind.scheme, bits=kind.bits)),
        targets,
        bias,
        -100,
        [0.2, 5.0],
        PANEL,
        need_grad,
    )
    torch.library.opcheck(torch.ops.mebp_triton.int4_cross_entropy.default, args)


def test_fake_results_have_the_shape_and_dtype_of_real_ones(make_weight, normal, device):
    weight = make_weight(7, 70, 32)
    ids, targets = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.tensor([1, -100, 6], device=device)
    for function, args in (
        (int4_matmul, (normal(2, 3, 70, dtype=torch.bfloat16), weight)),
        (int4_matmul_dx, (normal(2, 3, 7, dtype=torch.bfloat16), weight)),
        (int4_embedding, (ids, weight, torch.bfloat16)),
        (int4_cross_entropy, (normal(3, 70, dtype=torch.bfloat16), weight, targets)),
    ):
        on_meta = [arg.to("meta") if hasattr(arg, "to") else arg for arg in args]
        real, fake = function(*args), function(*on_meta)
        for left, right in zip(*(r if isinstance(r, tuple) else (r,) for r in (real, fake)), strict=True):
            assert (left.shape, left.dtype) == (right.shape, right.dtype)
            assert right.device.type == "meta"


def wide(normal, *shape, seed=1):
    return normal(*shape, dtype=torch.float64, seed=seed).requires_grad_(True)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
def test_gradcheck_matmul(make_weight, normal, kind, scale_dtype):
    weight = make_weight(5, 70, 32, kind.scheme, scale_dtype, bits=kind.bits)

    def function(x, bias, t, b):
        return int4_matmul(x, weight, bias, t, b, PANEL)

    inputs = wide(normal, 2, 2, 70), wide(normal, 5), wide(normal, 2, 2, 3), wide(normal, 5, 3)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
def test_gradcheck_matmul_dx(make_weight, normal, kind, scale_dtype):
    weight = make_weight(5, 70, 32, kind.scheme, scale_dtype, bits=kind.bits)

    def function(dy, g, a):
        return int4_matmul_dx(dy, weight, g, a, PANEL)

    inputs = wide(normal, 2, 2, 5), wide(normal, 2, 2, 3), wide(normal, 3, 70)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-6)


def test_second_derivatives(make_weight, normal):
    weight = make_weight(5, 33, 32)

    def function(x, t, b):
        return int4_matmul(x, weight, None, t, b, PANEL).tanh()

    inputs = wide(normal, 2, 33), wide(normal, 2, 3), wide(normal, 5, 3)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("factors", [(1.0,), (0.3,), (0.2, 5.0)], ids=str)
def test_gradcheck_cross_entropy(make_weight, normal, kind, device, factors):
    weight, targets = make_weight(7, 33, 32, kind.scheme, bits=kind.bits), torch.tensor([1, -100, 6, 0], device=device)
    bias = normal(7, dtype=torch.float64)

    def function(hidden):
        return int4_cross_entropy(hidden, weight, targets, bias, factors=factors)[0]

    assert torch.autograd.gradcheck(function, (wide(normal, 4, 33),), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("wanted", ["x", "bias", "t", "b"])
def test_only_what_requires_a_gradient_gets_one(make_weight, normal, wanted):
    weight = make_weight(5, 70)
    operands = {"x": normal(3, 70), "bias": normal(5), "t": normal(3, 2), "b": normal(5, 2)}
    operands[wanted].requires_grad_(True)
    y = int4_matmul(operands["x"], weight, operands["bias"], operands["t"], operands["b"])
    twin = reference.matmul(operands["x"], weight, operands["bias"], operands["t"], operands["b"])
    (found,) = torch.autograd.grad(y.square().sum(), operands[wanted])
    (truth,) = torch.autograd.grad(twin.square().sum(), operands[wanted])
    torch.testing.assert_close(found, truth)


def test_gradients_come_in_the_dtype_of_their_operand(make_weight, normal):
    weight = make_weight(5, 70)
    x = normal(3, 70, dtype=torch.bfloat16).requires_grad_(True)
    bias, t, b = normal(5).requires_grad_(True), normal(3, 2).requires_grad_(True), normal(5, 2).requires_grad_(True)
    int4_matmul(x, weight, bias, t, b).float().sum().backward()
    for operand in (x, bias, t, b):
        assert operand.grad.dtype == operand.dtype and operand.grad.isfinite().all()


def test_cross_entropy_that_kept_nothing_has_no_backward(make_weight, normal, device):
    weight, targets = make_weight(7, 70), torch.tensor([1, -100, 6], device=device)
    hidden = normal(3, 70).requires_grad_(True)
    args = (hidden, *fields_of(weight), targets, None, -100, [1.0], PANEL, False)
    losses, *_ = torch.ops.mebp_triton.int4_cross_entropy(*args)
    with pytest.raises(RuntimeError, match="need_grad=False"):
        losses.sum().backward()


def test_cross_entropy_backward_weighs_every_token(make_weight, normal, device):
    weight, targets = make_weight(7, 70), torch.tensor([1, -100, 6, 2], device=device)
    hidden = normal(4, 70, dtype=torch.float64).requires_grad_(True)
    weights = torch.tensor([2.0, 5.0, 0.0, -1.0], dtype=torch.float64, device=device)
    losses, argmax = int4_cross_entropy(hidden, weight, targets)
    assert not argmax.requires_grad
    (losses * weights).sum().backward()
    truth = reference.cross_entropy(hidden[:1], weight, targets[:1])[1] * 2
    torch.testing.assert_close(hidden.grad[:1], truth)
    truth = reference.cross_entropy(hidden[3:], weight, targets[3:])[1] * -1
    torch.testing.assert_close(hidden.grad[3:], truth)
    assert not hidden.grad[1:3].any()


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_the_op_has_the_bits_and_the_derivatives_of_the_direct_way(make_weight, normal, kernel):
    """Second derivatives among them: bias, t and b of the forward product, g and a of the other."""
    weight = make_weight(7, 70, 32, "affine")
    shapes = [(3, 70), (7,), (3, 4), (7, 4)] if kernel == "matmul" else [(3, 7), (3, 4), (4, 70)]
    tensors = [normal(*shape, dtype=torch.float64, seed=place).requires_grad_() for place, shape in enumerate(shapes)]
    op = getattr(torch.ops.mebp_triton, f"int4_{kernel}")

    def derivatives(call):
        y = call()
        first = torch.autograd.grad(y.sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum((one**3).sum() for one in first), tensors, allow_unused=True)
        second = [one for one in second if one is not None]
        return y, *first, *second

    ours = derivatives(lambda: getattr(ops, kernel)(tensors[0], weight, *tensors[1:], PANEL))
    theirs = derivatives(lambda: op(tensors[0], *fields_of(weight), *tensors[1:], PANEL))
    assert len(ours) > len(tensors) + 2
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and one.abs().max() > 0


def test_only_what_is_watched_goes_through_the_dispatcher(make_weight, normal, monkeypatch):
    """By the op a mode sees one operation, and a fake tensor has a shape without a computation."""
    weight, x = make_weight(7, 70), normal(3, 70)
    seen, own = [], ops.matmul_op
    monkeypatch.setattr(ops, "matmul_op", lambda *given: seen.append(1) or own(*given))
    int4_matmul(x, weight, backend=PANEL)
    int4_matmul(x.clone().requires_grad_(), weight, backend=PANEL).sum().backward()
    assert not seen
    with FlopCounterMode(display=False):
        int4_matmul(x, weight, backend=PANEL)
    assert len(seen) == 1
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert int4_matmul(mode.from_tensor(x), weight, backend=PANEL).shape == (3, 7)
    assert len(seen) == 2


def test_what_watches_sees_the_dx_of_a_group_as_one_operation_with_the_same_bits(make_weight, normal, monkeypatch):
    weights, dys = [make_weight(n, 200) for n in (7, 90, 20)], [normal(40, n, seed=n) for n in (7, 90, 20)]
    g, a = normal(40, 5), normal(5, 200)
    alone = int4_matmul_dx_group(dys, weights, g, a, PANEL)
    called, own = [], functions.matmul_dx_group_op
    monkeypatch.setattr(functions, "matmul_dx_group_op", lambda *given: called.append(1) or own(*given))
    with FlopCounterMode(display=False):
        assert torch.equal(int4_matmul_dx_group(dys, weights, g, a, PANEL), alone)
    assert len(called) == bool(native.instructions())


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
def test_batched_gradients(make_weight, normal, kernel):
    """Under vmap, which tensors of torch's own class pass through, a kernel has no address to read."""
    weight = make_weight(7, 70)
    function, width = (int4_matmul, 70) if kernel == "matmul" else (int4_matmul_dx, 7)
    x = normal(3, width, dtype=torch.float64).requires_grad_()
    y = function(x, weight, backend=PANEL)
    several = normal(4, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    for one, gradient in zip(several, batched, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("strides", [(2, 1), (1, 3)], ids=str)
def test_rows_get_leading_dimensions_whatever_their_strides(strides):
    y = torch.arange(6.0).as_strided((3, 2), strides)
    expected = y.tolist()
    assert shaped(y, torch.zeros(3, 1, 5)).tolist() == [[row] for row in expected]
