"""The operations as functions of ``Int4Weight``: shapes, mistakes, and which launcher a call takes."""

import functools

import pytest
import torch
from pairs import pairs

from mebp_triton.autotune.expert_cases import in_one_storage
from mebp_triton.kernels import expert_products, functions, ops, reference, routing
from mebp_triton.kernels.accuracy import judge
from mebp_triton.kernels.configs import PANEL, TileConfig, default_config
from mebp_triton.kernels.functions import (
    int4_cross_entropy,
    int4_expert_products,
    int4_expert_products_dx,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
    int4_matmul_group,
)
from mebp_triton.kernels.names import SCHEMES


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_products_of_experts(make_weight, normal, dtype, lora):
    """Each expert's rows by its own weight, against float64: some have one row, one has none."""
    weights, rows, rank = [make_weight(12, 70) for _ in range(4)], [1, 5, 0, 9], 3
    x, dy = normal(15, 70, dtype=dtype), normal(15, 12, dtype=dtype)
    t, g = (normal(15, rank, dtype=dtype) if lora else None for _ in range(2))
    b, a = (normal(4, size, rank, dtype=dtype) for size in (12, 70))
    a = a.transpose(1, 2).contiguous()
    y = int4_expert_products(x, weights, rows, t, b if lora else None)
    dx = int4_expert_products_dx(dy, weights, rows, g, a if lora else None)
    assert (y.shape, dx.shape, y.dtype, dx.dtype) == ((15, 12), (15, 70), dtype, dtype)
    start = 0
    for expert, count in enumerate(rows):
        own = slice(start, start + count)
        for ours, given, factor, terms, others in (
            (y, x, lambda exact: exact.t(), t, b.transpose(1, 2)),
            (dx, dy, lambda exact: exact, g, a),
        ):
            wide, narrow = (reference.decode(weights[expert], one) for one in (torch.float64, torch.float32))
            same, truth = given[own] @ factor(narrow).to(dtype), given[own].double() @ factor(wide)
            if lora:
                same, truth = same + terms[own] @ others[expert], truth + terms[own].double() @ others[expert].double()
            assert judge(ours[own], same, truth)["ok"]
        start += count


def test_stride_0_gradient(make_weight, normal):
    """The gradient of ``sum()`` is one number, expanded with strides 0."""
    weight, x = make_weight(5, 70), normal(2, 3, 70).requires_grad_(True)
    int4_matmul(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, reference.decode(weight, torch.float32).sum(0).expand(2, 3, 70))


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
            lambda x, weight: int4_matmul_group(x, [weight], None, torch.zeros(3, 2), torch.zeros(7, 2)),
        ),
        (7, lambda dy, weight: int4_matmul_dx_group([dy, dy], [weight, weight])),
        (70, lambda x, weight: int4_cross_entropy(x, weight, torch.zeros(3).long())),
    ],
)
def test_integers_are_no_activations(make_weight, columns, call, dtype):
    with pytest.raises(TypeError, match=f"is {dtype}, wanted a floating dtype"):
        call(torch.zeros(3, columns, dtype=dtype), make_weight(7, 70).to("cpu"))


ROUTES = (TileConfig(16, 32, 64, split=2), None)


class Told:
    """Routes as a test sets them."""

    def __init__(self, choose):
        self.choose = choose


@pytest.mark.usefixtures("triton_kernels")
class TestRoutes:
    """Operations by the route that the tables give, in Triton's interpreter."""

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch, device):
        if device == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")

    @pytest.fixture(params=ROUTES, ids=["tile", "panel"])
    def route(self, request, monkeypatch):
        monkeypatch.setattr(routing, "routes_of", lambda architecture: Told(lambda problem: request.param))

    def test_single(self, make_weight, normal, scheme, route):
        weight, x, dy = make_weight(20, 70, 32, scheme), normal(2, 3, 70), normal(2, 3, 20)
        t, b, g, a = normal(2, 3, 4), normal(20, 4, seed=2), normal(2, 3, 4, seed=3), normal(4, 70, seed=4)
        y, dx = int4_matmul(x, weight, None, t, b, "triton"), int4_matmul_dx(dy, weight, g, a, "triton")
        torch.testing.assert_close(y, reference.matmul(x, weight, None, t, b), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx, reference.matmul_dx(dy, weight, g, a), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("scheme", "route", "group_sizes", "with_bias"),
        pairs(SCHEMES, ROUTES, [(32, 32, 32), (32, 64, 32)], [False, True]),
        indirect=["route"],
        ids=str,
    )
    def test_group(self, make_weight, normal, scheme, route, group_sizes, with_bias):
        """Members that no launch can take together are computed as well."""
        sizes, rank = (20, 1, 33), 4
        weights = [make_weight(n, 70, size, scheme, seed=n) for n, size in zip(sizes, group_sizes, strict=True)]
        x, bias = normal(2, 3, 70), normal(54, seed=5) if with_bias else None
        t, b = normal(2, 3, 3 * rank, seed=2), normal(54, rank, seed=3)
        found = int4_matmul_group(x, weights, bias, t, b, "triton")
        biases = bias.split(sizes) if with_bias else [None] * 3
        for y, *operands in zip(found, weights, biases, t.split(rank, dim=-1), b.split(sizes), strict=True):
            torch.testing.assert_close(y, reference.matmul(x, *operands), rtol=1e-4, atol=1e-4)
        dys = [normal(2, 3, n, seed=n) for n in sizes]
        g, a = normal(2, 3, 3 * rank), normal(3 * rank, 70)
        truth = sum(reference.matmul_dx(dy, weight) for dy, weight in zip(dys, weights, strict=True)) + g @ a
        torch.testing.assert_close(int4_matmul_dx_group(dys, weights, g, a, "triton"), truth, rtol=1e-4, atol=1e-4)

    def test_members_that_are_not_alike_have_routes_of_their_own(self, make_weight, normal, monkeypatch):
        """They must not go by panels when the tables say otherwise."""
        asked = []
        told = Told(lambda problem: asked.append(problem.n) or default_config(problem))
        monkeypatch.setattr(routing, "routes_of", lambda architecture: told)
        monkeypatch.setattr(functions, "int4_matmul_dx_group_panel", lambda *args, **kwargs: pytest.fail("by panels"))
        weights = [make_weight(20, 70, 32), make_weight(9, 70, 64)]
        int4_matmul_dx_group([normal(3, 20), normal(3, 9)], weights, backend="triton")
        assert sorted(asked) == [9, 20]

    @pytest.mark.parametrize(("apart", "route"), [(False, TileConfig(16, 16, 64)), (False, PANEL), (True, PANEL)])
    def test_experts(self, make_weight, normal, monkeypatch, apart, route):
        """Weights in one storage go in one launch, unless the route is panels; others one by one. All are right."""
        launched, rows, experts = [], [3, 0, 5], [make_weight(20, 70, 32, seed=seed) for seed in range(3)]
        if not apart:
            experts = in_one_storage(experts)
        for name in ("int4_expert_products_triton", "int4_expert_products_dx_triton"):
            told = functools.partial(noted, launched, getattr(expert_products, name))
            monkeypatch.setattr(expert_products, name, told)
        told = Told(lambda problem: route)
        told.over_experts = told
        monkeypatch.setattr(routing, "routes_of", lambda architecture: told)
        x, dy = normal(8, 70), normal(8, 20)
        t, b, g, a = normal(8, 4), normal(3, 20, 4, seed=2), normal(8, 4, seed=3), normal(3, 4, 70, seed=4)
        y = int4_expert_products(x, experts, rows, t, b, "triton")
        dx = int4_expert_products_dx(dy, experts, rows, g, a, "triton")
        assert len(launched) == (2 if isinstance(route, TileConfig) else 0)
        assert all(config == route for config in launched)
        ys = zip(x.split(rows), experts, [None] * 3, t.split(rows), b, strict=True)
        dxs = zip(dy.split(rows), experts, g.split(rows), a, strict=True)
        y_truth, dx_truth = (
            torch.cat([twin(*one) for one in parts])
            for twin, parts in ((reference.matmul, ys), (reference.matmul_dx, dxs))
        )
        torch.testing.assert_close(y, y_truth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx, dx_truth, rtol=1e-4, atol=1e-4)


def noted(launched, launch, *operands):
    launched.append(operands[-1])
    return launch(*operands)
