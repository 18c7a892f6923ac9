"""Times forward, dX, the LoRA layer and the loss: ours, torch on the decoded weight, bitsandbytes.

    python -m pytest bench/ --benchmark-only --benchmark-json=bench/results/NAME.json

On a CPU the dtype is float32 and ours is the panel path; on a GPU it is bfloat16, with the Triton path as well. Ours
and torch have the same weight, and so have ours of NF4 and bitsandbytes. All are checked against torch's product first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.operands import close, nf4_pair
from gpu.speed import SAME, bitsandbytes_dx
from torch import Tensor

from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.functions import int4_cross_entropy, int4_matmul, int4_matmul_dx
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_function import int4_lora_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKENDS = ("triton", "panel") if DEVICE.type == "cuda" else ("panel",)
SIDES = (*BACKENDS, "torch", *(f"{backend}_nf4" for backend in BACKENDS), "bitsandbytes")
SHAPES = ((1536, 576), (4864, 896), (896, 4864))
TOKENS = (1, 32, 256)
RANK, SCALING = 16, 2.0
ROUNDS, WARMUP = 9, 2

Product = Callable[[Tensor], Tensor]


def measure(benchmark: Any, group: str, problem: str, side: str, call: Callable[[], object]) -> None:
    def synchronized() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info |= {"problem": problem, "side": side}
    benchmark.pedantic(synchronized, rounds=ROUNDS, warmup_rounds=WARMUP)


def weight_of(side: str, n: int, k: int) -> tuple[Int4Weight, Any]:
    """The weight that a side multiplies with, in our form; for NF4 also bitsandbytes' codes and state."""
    torch.manual_seed(0)
    if side.endswith("nf4") or side == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="a peer, no dependency")
        packed, state, weight = nf4_pair(n, k, DTYPE, DEVICE)
        return weight, (packed, state)
    return random_weight(n, k, DEVICE), None


def backend_of(side: str) -> str:
    return side.removesuffix("_nf4")


def product_of(side: str, weight: Int4Weight, theirs: Any, dx: bool = False) -> Product:
    """A side's forward product, or its product for dX."""
    if side == "torch":
        decoded = decode(weight, DTYPE) if dx else decode(weight, DTYPE).t()
        return lambda x: x @ decoded
    if side == "bitsandbytes":
        import bitsandbytes

        if not dx:
            return lambda x: bitsandbytes.matmul_4bit(x, theirs[0].t(), quant_state=theirs[1])
        # The product in its backward pass.
        return lambda dy: torch.matmul(dy, bitsandbytes.functional.dequantize_4bit(*theirs).to(dy.dtype))
    return lambda x: (int4_matmul_dx if dx else int4_matmul)(x, weight, backend=backend_of(side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("group", ["forward", "dX"])
def test_product(benchmark: Any, group: str, n: int, k: int, m: int, side: str) -> None:
    weight, theirs = weight_of(side, n, k)
    x = normal(m, n if group == "dX" else k, dtype=DTYPE, device=DEVICE)
    product = product_of(side, weight, theirs, group == "dX")
    expected = product_of("torch", weight, None, group == "dX")(x)
    with torch.no_grad():
        assert close(product(x), expected, SAME[DTYPE])
    if side == "bitsandbytes" and group == "dX":
        assert close(expected, bitsandbytes_dx(x, *theirs), SAME[DTYPE])
    with torch.no_grad():
        measure(benchmark, group, f"M={m}, {n} x {k}", side, lambda: product(x))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_lora_layer(benchmark: Any, n: int, k: int, side: str, m: int = 256) -> None:
    """Forward and backward, with the gradients of X, A and B."""
    weight, theirs = weight_of(side, n, k)
    x = normal(m, k, dtype=DTYPE, device=DEVICE).requires_grad_()
    a = (normal(RANK, k, dtype=torch.float32, device=DEVICE) / k**0.5).requires_grad_()
    b = (0.02 * normal(n, RANK, dtype=torch.float32, device=DEVICE)).requires_grad_()
    dy = normal(m, n, dtype=DTYPE, device=DEVICE)

    def step_with(layer: Product) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, a, b), dy)

    def around(product: Product) -> Product:
        return lambda x: product(x) + (x @ a.to(DTYPE).t() * SCALING) @ b.to(DTYPE).t()

    if side in ("torch", "bitsandbytes"):
        layer = around(product_of(side, weight, theirs))
    else:

        def layer(x: Tensor) -> Tensor:
            return int4_lora_linear(x, weight, None, a, b, SCALING, backend_of(side))

    expected = step_with(around(product_of("torch", weight, None)))
    for found, right in zip(step_with(layer), expected, strict=True):
        assert close(found, right, SAME[DTYPE])
    measure(benchmark, "LoRA layer, forward and backward", f"M={m}, {n} x {k}", side, lambda: step_with(layer))


@pytest.mark.parametrize("side", (*BACKENDS, "torch"))
@pytest.mark.parametrize(("v", "k"), [(49152, 576)])
def test_loss(benchmark: Any, v: int, k: int, side: str, m: int = 256) -> None:
    """Cross-entropy over a head, and its gradient; bitsandbytes has no side, since it leaves the head in 16 bits."""
    weight, _ = weight_of(side, v, k)
    hidden = normal(m, k, dtype=DTYPE, device=DEVICE).requires_grad_()
    targets = torch.randint(0, v, (m,), device=DEVICE)
    decoded = decode(weight, DTYPE)

    def plain() -> Tensor:
        return torch.nn.functional.cross_entropy((hidden @ decoded.t()).float(), targets)

    def ours() -> Tensor:
        return int4_cross_entropy(hidden, weight, targets, backend=side)[0].mean()

    def step_with(loss: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(), hidden)[0]

    loss = plain if side == "torch" else ours
    assert close(step_with(loss), step_with(plain), SAME[DTYPE])
    measure(benchmark, "loss, forward and backward", f"M={m}, {v} x {k}", side, lambda: step_with(loss))
