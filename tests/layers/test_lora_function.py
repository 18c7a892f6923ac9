"""LoRA over an int4 weight as an autograd function: its results and gradients are those of the formula."""

import gc
import weakref

import pytest
import torch
from allocations import Allocations
from lora_layers import lora_formula, make_weight, normal, operands

from mebp_triton.kernels.names import FORMS, Form
from mebp_triton.layers.lora_function import LoraOperand, int4_lora_linear, int4_lora_linears


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(form):
    weight = make_weight(4, 33, form.scheme, form.group_size, bits=form.bits)
    given = operands(n=4, k=33, rank=2, lead=(1, 2))

    def function(x, bias, a, b):
        return int4_lora_linear(x, weight, bias, a, b, 1.5)

    assert torch.autograd.gradcheck(function, tuple(given.values()), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("wanted", ["x", "bias", "a", "b", "x a b bias", "a b"])
def test_gradients_of_what_requires_them(wanted):
    weight, given = make_weight(), operands()
    for name, tensor in given.items():
        tensor.requires_grad_(name in wanted.split())
    asked = [given[name] for name in wanted.split()]
    ours = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
    truth = lora_formula(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    dy = normal(*ours.shape, dtype=torch.float64, seed=9)
    for found, exact in zip(torch.autograd.grad(ours, asked, dy), torch.autograd.grad(truth, asked, dy), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("limit", [{torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}], ids=["limits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_torch_in_the_same_dtype(dtype, limit):
    weight = make_weight(90, 200)
    given = operands(dtype, n=90, k=200, rank=8, lead=(3, 40))
    wide = {name: tensor.detach().double().requires_grad_(True) for name, tensor in given.items()}
    twin = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in given.items()}
    dy = normal(3, 40, 90, dtype=dtype, seed=9)
    results = []
    for function, set_ in ((int4_lora_linear, given), (lora_formula, twin), (lora_formula, wide)):
        y = function(set_["x"], weight, set_["bias"], set_["a"], set_["b"], 2.0)
        grads = torch.autograd.grad(y, list(set_.values()), dy.to(y.dtype))
        results.append({"y": y, **dict(zip(set_, grads, strict=True))})
    for name, truth in results[2].items():
        ours, theirs = ((result[name].double() - truth).norm() / truth.norm() for result in results[:2])
        assert ours <= limit[dtype], name
        assert ours <= 2 * theirs + torch.finfo(dtype).eps / 2, name


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapter_and_activations_of_different_dtypes(activations, adapter):
    weight, given = make_weight(), operands(torch.float32)
    x = given["x"].detach().to(activations).requires_grad_(True)
    a, b = (given[name].detach().to(adapter).requires_grad_(True) for name in ("a", "b"))
    y = int4_lora_linear(x, weight, None, a, b, 1.5)
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (activations, activations, adapter, adapter)
    twin = [tensor.detach().double().requires_grad_(True) for tensor in (x, a, b)]
    lora_formula(twin[0], weight, None, *twin[1:], 1.5).square().sum().backward()
    for name, ours, truth in zip("xab", (x, a, b), twin, strict=True):
        assert (ours.grad.double() - truth.grad).norm() < 0.02 * truth.grad.norm(), name


def test_adapter_gradients_are_accumulated_in_float32():
    """4096 tokens of gradient 2^-9 each: a bfloat16 sum would stop at 0.5 or so."""
    weight = make_weight(2, 64)
    x = torch.ones(4096, 64, dtype=torch.bfloat16)
    a, b = torch.full((1, 64), 1 / 64).requires_grad_(True), torch.ones(2, 1).requires_grad_(True)
    y = int4_lora_linear(x, weight, None, a, b, 1.0)
    y.backward(torch.full_like(y, 2**-9))
    torch.testing.assert_close(b.grad, torch.full((2, 1), 8.0))
    torch.testing.assert_close(a.grad, torch.full((1, 64), 16.0))


def test_stride_0_and_transposed_gradients():
    weight, given = make_weight(), operands()
    asked = list(given.values())
    for loss in (lambda y: y.sum(), lambda y: (y.transpose(0, 1) * normal(4, 2, 9, dtype=torch.float64)).sum()):
        ours = torch.autograd.grad(loss(int4_lora_linear(asked[0], weight, *asked[1:], 1.5)), asked)
        truth = torch.autograd.grad(loss(lora_formula(asked[0], weight, *asked[1:], 1.5)), asked)
        for found, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(found, exact)


def test_non_contiguous_and_expanded_inputs():
    weight, given = make_weight(), operands()
    wide = normal(140, 2, 4, dtype=torch.float64)
    for x in (wide[::2].permute(1, 2, 0), wide[:70, :1, :1].permute(1, 2, 0).expand(2, 4, 70)):
        x = x.detach().requires_grad_(True)
        args = (given["bias"], given["a"], given["b"], 1.5)
        ours = torch.autograd.grad(int4_lora_linear(x, weight, *args).square().sum(), [x, given["a"]])
        truth = torch.autograd.grad(lora_formula(x, weight, *args).square().sum(), [x, given["a"]])
        for found, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(found, exact)


def test_used_twice_and_added_to_what_is_there():
    weight, given = make_weight(9, 9), operands(n=9, k=9)
    for tensor in given.values():
        tensor.grad = torch.ones_like(tensor)
    args = (given["bias"], given["a"], given["b"], 0.5)
    int4_lora_linear(int4_lora_linear(given["x"], weight, *args), weight, *args).square().sum().backward()
    exact = torch.autograd.grad(
        lora_formula(lora_formula(given["x"], weight, *args), weight, *args).square().sum(), list(given.values())
    )
    for tensor, truth in zip(given.values(), exact, strict=True):
        torch.testing.assert_close(tensor.grad, truth + 1)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (1,), (1, 1)])
def test_no_token_and_one(lead):
    weight, given = make_weight(), operands(lead=lead)
    y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
    truth = lora_formula(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
    torch.testing.assert_close(y, truth)
    y.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in given.values())


def test_one_vector():
    weight, given = make_weight(), operands(lead=())
    args = (given["bias"], given["a"], given["b"], 1.5)
    asked = list(given.values())
    y = int4_lora_linear(given["x"], weight, *args)
    ours, truth = (torch.autograd.grad(f.square().sum(), asked) for f in (y, lora_formula(given["x"], weight, *args)))
    for found, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, exact)


def test_autocast_of_the_forward_holds_for_the_backward():
    weight, given = make_weight(), operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # autocast is off here
    assert all(tensor.grad.dtype == torch.float32 for tensor in given.values())
    x = given["x"].detach().bfloat16().requires_grad_(True)
    again = int4_lora_linear(x, weight, given["bias"], given["a"], given["b"], 1.5)
    assert torch.equal(again, y)
    assert torch.equal(torch.autograd.grad(again.float().sum(), x)[0].float(), given["x"].grad)


def test_a_known_output_is_the_result_and_has_the_same_gradients():
    weight, given = make_weight(), operands()
    args = (given["x"], weight, given["bias"], given["a"], given["b"], 1.5, "auto")
    dy = normal(2, 4, 9, dtype=torch.float64)
    real = int4_lora_linear(*args)
    unused = int4_lora_linear(*args, known=torch.full_like(real, float("nan")))
    assert unused.isnan().all() and (unused.shape, unused.dtype) == (real.shape, real.dtype)
    asked = list(given.values())
    for found, exact in zip(torch.autograd.grad(unused, asked, dy), torch.autograd.grad(real, asked, dy), strict=True):
        assert torch.equal(found, exact)


def test_a_known_output_is_not_kept_alive():
    """Its graph must not lead back to it."""
    weight, given = make_weight(), operands()
    known = normal(2, 4, 9, dtype=torch.float64)
    y = int4_lora_linear(given["x"], weight, None, given["a"], given["b"], 1.5, known=known)
    gone = weakref.ref(known)
    gc.disable()
    try:
        del known, y
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_of_the_weights_size_is_allocated():
    n, k = 400, 512
    weight, given = make_weight(n, k), operands(torch.float32, n=n, k=k, lead=(4,))
    with Allocations() as allocations:
        y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
        y.square().sum().backward()
    assert 4 * k <= allocations.largest <= n * k // 16


def test_gradients_have_no_gradients_of_their_own():
    weight, given = make_weight(), operands()
    y = int4_lora_linear(given["x"], weight, given["bias"], given["a"], given["b"], 1.5)
    (grad,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operands_are_frozen():
    operand = LoraOperand(make_weight(), None, torch.ones(1, 70), torch.ones(9, 1), 1.0)
    with pytest.raises(AttributeError):
        operand.scaling = 2.0


# Several layers with one input: height, rank, scaling, and whether there is a bias, of each.
SIZES = ((9, 3, 1.5, True), (5, 1, -0.5, False), (12, 2, 2.0, True))


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("wanted", ["x bias a b", "bias", "b", "a bias"])
def test_outputs_and_gradients_of_several(used, wanted):
    forms = [Form("symmetric", 32), Form("symmetric", 16, 8), Form("codebook", 32)]  # as in a file of mixed types
    weights = [
        make_weight(n, 70, form.scheme, form.group_size, n, form.bits)
        for (n, *_), form in zip(SIZES, forms, strict=True)
    ]
    x = normal(2, 4, 70, dtype=torch.float64).requires_grad_("x" in wanted)
    asked, layers = [x] if "x" in wanted else [], []
    for (n, rank, scaling, with_bias), weight in zip(SIZES, weights, strict=True):
        given = operands(n=n, rank=rank)
        tensors = {name: given[name].detach() for name in ("bias", "a", "b")}
        if not with_bias:
            tensors["bias"] = None
        for name, tensor in tensors.items():
            if tensor is not None and name in wanted.split():
                asked.append(tensor.requires_grad_(True))
        layers.append(LoraOperand(weight, tensors["bias"], tensors["a"], tensors["b"], scaling))
    ours = int4_lora_linears(x, layers)
    truth = [lora_formula(x, o.weight, o.bias, o.lora_a, o.lora_b, o.scaling) for o in layers]
    for found, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    used = [place for place in used if truth[place].requires_grad]
    dys = [normal(2, 4, SIZES[place][0], dtype=torch.float64, seed=20 + place) for place in used]
    if not used:
        return
    found = torch.autograd.grad([ours[place] for place in used], asked, dys, allow_unused=True)
    exact = torch.autograd.grad([truth[place] for place in used], asked, dys, allow_unused=True)
    assert any(gradient is not None for gradient in exact)
    for one, other in zip(found, exact, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def test_a_backward_pass_under_autocast_has_the_same_bits():
    """Where only backward() is called under it. There is an input of the LoRA branch's own, as after dropout."""
    weight, given = make_weight(), operands(torch.float32)
    leaves = list(given.values())

    def gradients(dropped, enabled):
        operand = LoraOperand(weight, given["bias"], given["a"], given["b"], 1.5)
        (y,) = int4_lora_linears(given["x"], [operand], inner=given["x"] * 2 if dropped else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(y.square().sum(), leaves)

    for dropped in (False, True):
        for ours, own in zip(gradients(dropped, True), gradients(dropped, False), strict=True):
            assert torch.equal(ours, own)


def test_wide_gradients_of_narrow_activations_are_not_rounded():
    """Those of a bias, and of float32 adapters beside bfloat16 ones with the same input."""
    x = operands(torch.bfloat16)["x"]
    wide, narrow = operands(torch.float32), operands(torch.bfloat16)
    layers = [LoraOperand(make_weight(), one["bias"], one["a"], one["b"], 1.5) for one in (wide, narrow)]
    for order in (layers, layers[::-1]):
        ys = int4_lora_linears(x, order)
        for gradient in torch.autograd.grad(
            sum(y.float().square().sum() for y in ys), [wide[n] for n in wide if n != "x"]
        ):
            assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float())
