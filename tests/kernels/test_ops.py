"""The ``torch.library`` ops: registration, fake implementations, derivatives, backends."""

import functools
import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

from mebp_triton.kernels import functions, matmul, ops, reference, routing, tables
from mebp_triton.kernels.configs import Problem, TileConfig, default_config
from mebp_triton.kernels.functions import (
    int4_cross_entropy,
    int4_embedding,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
    int4_matmul_group,
)
from mebp_triton.kernels.names import BACKENDS, SCHEMES
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.kernels.tables import Entry

PANEL = "panel"


def fields(weight):
    return weight.packed, weight.scales, weight.minimum, weight.codebook, weight.in_features, weight.group_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("with_bias", "with_lora"), [(False, False), (True, True)])
def test_opcheck_matmul(make_weight, normal, scheme, dtype, with_bias, with_lora):
    bias = normal(7, dtype=dtype).requires_grad_(True) if with_bias else None
    t, b = (normal(*s, dtype=dtype).requires_grad_(True) if with_lora else None for s in ((3, 4), (7, 4)))
    x = normal(3, 70, dtype=dtype).requires_grad_(True)
    args = (x, *fields(make_weight(7, 70, 32, scheme)), bias, t, b, PANEL)
    torch.library.opcheck(torch.ops.mebp_triton.int4_matmul.default, args)


@pytest.mark.parametrize("with_lora", [False, True])
def test_opcheck_matmul_dx(make_weight, normal, scheme, with_lora):
    g, a = (normal(*shape).requires_grad_(True) if with_lora else None for shape in ((3, 4), (4, 70)))
    args = (normal(3, 7).requires_grad_(True), *fields(make_weight(7, 70, 32, scheme)), g, a, PANEL)
    torch.library.opcheck(torch.ops.mebp_triton.int4_matmul_dx.default, args)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_opcheck_embedding(make_weight, scheme, device, shape):
    ids = torch.randint(0, 7, shape, device=device)
    args = (ids, *fields(make_weight(7, 70, 32, scheme)), torch.bfloat16, PANEL)
    torch.library.opcheck(torch.ops.mebp_triton.int4_embedding.default, args)


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck_cross_entropy(make_weight, normal, scheme, device, need_grad, with_bias):
    targets = torch.tensor([1, -100, 6, 0], device=device)
    bias = normal(7) if with_bias else None
    hidden = normal(4, 70).requires_grad_(need_grad)
    args = (hidden, *fields(make_weight(7, 70, 32, scheme)), targets, bias, -100, [0.2, 5.0], PANEL, need_grad)
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


def test_gradcheck_matmul(make_weight, normal, scheme):
    weight = make_weight(5, 70, 32, scheme)

    def function(x, bias, t, b):
        return int4_matmul(x, weight, bias, t, b, PANEL)

    inputs = wide(normal, 2, 2, 70), wide(normal, 5), wide(normal, 2, 2, 3), wide(normal, 5, 3)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-6)


def test_gradcheck_matmul_dx(make_weight, normal, scheme):
    weight = make_weight(5, 70, 32, scheme)

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


@pytest.mark.parametrize(("scheme", "factors"), zip(SCHEMES, [(1.0,), (0.3,), (0.2, 5.0)], strict=True), ids=str)
def test_gradcheck_cross_entropy(make_weight, normal, scheme, device, factors):
    weight, targets = make_weight(7, 33, 32, scheme), torch.tensor([1, -100, 6, 0], device=device)
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


def test_stride_0_gradient(make_weight, normal):
    """What ``sum()`` hands back is one number with strides 0."""
    weight, x = make_weight(5, 70), normal(2, 3, 70).requires_grad_(True)
    int4_matmul(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, reference.decode(weight, torch.float32).sum(0).expand(2, 3, 70))


def test_leading_dimensions(make_weight, normal):
    weight = make_weight(5, 70)
    for shape in ((70,), (0, 70), (3, 70), (2, 0, 70), (2, 3, 4, 70)):
        x = normal(*shape)
        torch.testing.assert_close(int4_matmul(x, weight), reference.matmul(x, weight))
        dy = normal(*shape[:-1], 5)
        torch.testing.assert_close(int4_matmul_dx(dy, weight), reference.matmul_dx(dy, weight))


def test_lora_operands_have_the_leading_dimensions_of_x(make_weight, normal):
    weight, x = make_weight(5, 70), normal(2, 3, 70)
    t, b = normal(2, 3, 4), normal(5, 4)
    torch.testing.assert_close(int4_matmul(x, weight, None, t, b), reference.matmul(x, weight, None, t, b))


def test_cross_entropy_makes_a_gradient_only_where_one_can_be_asked_for(make_weight, normal, device, monkeypatch):
    weight, targets = make_weight(7, 70), torch.tensor([1, -100, 6], device=device)
    hidden, asked = normal(3, 70), []
    panel = ops.int4_cross_entropy_panel
    monkeypatch.setattr(ops, "int4_cross_entropy_panel", lambda *args: asked.append(args[-2]) or panel(*args))
    int4_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        int4_cross_entropy(hidden.clone().requires_grad_(True), weight, targets)
    int4_cross_entropy(hidden.clone().requires_grad_(True), weight, targets)
    assert asked == [False, False, True]


def test_cross_entropy_that_kept_nothing_has_no_backward(make_weight, normal, device):
    weight, targets = make_weight(7, 70), torch.tensor([1, -100, 6], device=device)
    hidden = normal(3, 70).requires_grad_(True)
    args = (hidden, *fields(weight), targets, None, -100, [1.0], PANEL, False)
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


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda weight: int4_matmul(torch.zeros(3, 71), weight), "x must have 70 columns"),
        (lambda weight: int4_matmul(torch.zeros(()), weight), "x must have 70 columns"),
        (lambda weight: int4_matmul_dx(torch.zeros(3, 70), weight), "dy must have 7 columns"),
        (lambda weight: int4_cross_entropy(torch.zeros(3, 7), weight, torch.zeros(3).long()), "hidden must have 70"),
    ],
)
def test_wrong_widths(make_weight, call, name):
    with pytest.raises(ValueError, match=name):
        call(make_weight(7, 70).to("cpu"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(
    ("columns", "call"),
    [
        (70, int4_matmul),
        (7, int4_matmul_dx),
        (
            70,
            lambda x, weight: functions.int4_matmul_group(
                x, [weight], [None], [torch.zeros(3, 2)], [torch.zeros(7, 2)]
            ),
        ),
        (7, lambda dy, weight: functions.int4_matmul_dx_group([dy, dy], [weight, weight])),
        (70, lambda x, weight: int4_cross_entropy(x, weight, torch.zeros(3).long())),
    ],
)
def test_integers_are_no_activations(make_weight, columns, call, dtype):
    with pytest.raises(TypeError, match=f"is {dtype}, wanted a floating dtype"):
        call(torch.zeros(3, columns, dtype=dtype), make_weight(7, 70).to("cpu"))


def test_auto_means_panels_on_the_cpu_and_triton_on_a_gpu(monkeypatch):
    assert resolve_backend("auto", torch.device("cpu")) == "panel"
    assert resolve_backend("panel", torch.device("cuda")) == "panel"
    assert resolve_backend("auto", torch.device("cuda")) == ("triton" if routing.has_triton() else "panel")
    monkeypatch.setattr(routing, "has_triton", lambda: False)
    assert resolve_backend("auto", torch.device("cuda")) == "panel"
    with pytest.raises(ValueError, match="not installed"):
        resolve_backend("triton", torch.device("cuda"))


@pytest.mark.skipif(not routing.has_triton(), reason="needs the package triton")
def test_triton_on_the_cpu_is_an_error_outside_of_its_interpreter(monkeypatch, make_weight):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = make_weight(7, 70).to("cpu")
    ids = torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: int4_matmul(torch.zeros(3, 70), weight, backend="triton"),
        lambda: int4_matmul_dx(torch.zeros(3, 7), weight, backend="triton"),
        lambda: int4_embedding(ids, weight, torch.float32, backend="triton"),
    ):
        with pytest.raises(ValueError, match="runs on a GPU"):
            call()


@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_unknown_backends(backend):
    with pytest.raises(ValueError, match=f"one of {', '.join(BACKENDS)}, got {backend!r}"):
        resolve_backend(backend, torch.device("cpu"))


@pytest.mark.usefixtures("triton_kernels")
class TestRoutes:
    """Which launcher an operation takes; in Triton's interpreter."""

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch, device):
        if device == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")

    @pytest.fixture(params=[TileConfig(16, 32, 64, split=2), None], ids=["tile", "panel"])
    def route(self, request, monkeypatch):
        monkeypatch.setattr(ops, "choose", lambda problem, architecture: request.param)
        return request.param

    def test_single(self, make_weight, normal, scheme, route):
        weight, x, dy = make_weight(20, 70, 32, scheme), normal(2, 3, 70), normal(2, 3, 20)
        t, b, g, a = normal(2, 3, 4), normal(20, 4, seed=2), normal(2, 3, 4, seed=3), normal(4, 70, seed=4)
        y, dx = int4_matmul(x, weight, None, t, b, "triton"), int4_matmul_dx(dy, weight, g, a, "triton")
        torch.testing.assert_close(y, reference.matmul(x, weight, None, t, b), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx, reference.matmul_dx(dy, weight, g, a), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("group_sizes", [(32, 32, 32), (32, 64, 32)], ids=["alike", "not alike"])
    @pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 1, 2)], ids=str)
    def test_group(self, make_weight, normal, scheme, route, group_sizes, ranks):
        """With a bias for one of three; also members that no launch can take together."""
        sizes = (20, 1, 33)
        weights = [make_weight(n, 70, size, scheme, seed=n) for n, size in zip(sizes, group_sizes, strict=True)]
        x, biases = normal(2, 3, 70), [None, normal(1, seed=5), None]
        ts = [normal(2, 3, r, seed=r) for r in ranks]
        bs = [normal(n, r, seed=n) for n, r in zip(sizes, ranks, strict=True)]
        found = int4_matmul_group(x, weights, biases, ts, bs, "triton")
        for y, *operands in zip(found, weights, biases, ts, bs, strict=True):
            torch.testing.assert_close(y, reference.matmul(x, *operands), rtol=1e-4, atol=1e-4)
        dys = [normal(2, 3, n, seed=n) for n in sizes]
        g, a = normal(2, 3, sum(ranks)), normal(sum(ranks), 70)
        truth = sum(reference.matmul_dx(dy, weight) for dy, weight in zip(dys, weights, strict=True)) + g @ a
        torch.testing.assert_close(int4_matmul_dx_group(dys, weights, g, a, "triton"), truth, rtol=1e-4, atol=1e-4)

    def test_members_that_are_not_alike_have_routes_of_their_own(self, make_weight, normal, monkeypatch):
        """They must not fall to the panels, whatever the tables say."""
        asked = []
        monkeypatch.setattr(ops, "choose", lambda problem, _: asked.append(problem.n) or default_config(problem))
        monkeypatch.setattr(ops, "int4_matmul_dx_group_panel", lambda *args, **kwargs: pytest.fail("by panels"))
        weights = [make_weight(20, 70, 32), make_weight(9, 70, 64)]
        int4_matmul_dx_group([normal(3, 20), normal(3, 9)], weights, backend="triton")
        assert sorted(asked) == [9, 20]

    def test_what_does_not_fit_the_device_gives_way_to_the_default(self, make_weight, normal, monkeypatch):
        big = TileConfig(128, 128, 64)
        original = matmul.int4_matmul_triton

        def launch(*operands):
            if operands[-1] == big:
                raise OutOfResources(300_000, 101_376, "shared memory")
            return original(*operands)

        monkeypatch.setattr(matmul, "int4_matmul_triton", launch)
        key = tables.bucket(Problem("matmul", 5, 20, 70, dtype=torch.float32))
        table = {key: Entry(key, big, "static", 1.0, None, {})}
        monkeypatch.setattr(tables, "load_tables", functools.cache(lambda _: table))
        x, weight = normal(5, 70), make_weight(20, 70)
        tables.forget_tables()
        with pytest.warns(UserWarning, match="does not fit this device .* tune again"):
            y = int4_matmul(x, weight, backend="triton")
        torch.testing.assert_close(y, reference.matmul(x, weight), rtol=1e-4, atol=1e-4)
        # From then on at once.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(int4_matmul(x, weight, backend="triton"), y)
        tables.forget_tables()


def test_bfloat16_before_sm_80_goes_by_panels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, wanted in (((7, 5), "panel"), ((8, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16) == wanted
        assert resolve_backend("auto", torch.device("cuda"), torch.float16) == "triton"
