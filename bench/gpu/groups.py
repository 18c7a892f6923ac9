"""Timed layers with one input and their adapters: forward alone, and forward with all gradients.

The sides are ours, a 16-bit weight by the vendor's library, our weight decoded as a whole first, and bitsandbytes. Each
has the same adapters of rank 16 in float32, which the other sides round to the activations' dtype as autocast does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.accuracy import normal
from mebp_triton.kernels.embedding import decode_rows_triton
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_function import LoraOperand, int4_lora_linears

from .operands import clone, close, nf4_pair
from .session import Session
from .sizes import STORED, SYMMETRIC, Shape
from .timed import MOST_COPIES, SAME, in_turns, missing_peers

RANK, SCALING = 16, 1.0
# The outputs of all members for one input.
Layers = Callable[[Tensor], Sequence[Tensor]]
Adapter = tuple[Tensor, Tensor]


def grouped(session: Session, share: float) -> None:
    """Times every group of ``speed_groups`` at every number of tokens, into ``results["groups"]``."""
    rows = session.results["groups"] = []
    found: dict[Any, dict[str, tuple[str, list[Layers]]]] = {}
    adapters: dict[Any, list[Adapter]] = {}
    todo = list(product(session.sizes.speed_groups, session.sizes.speed_tokens, (False, True)))
    for shapes, m, backward in session.while_time("groups", todo, share):
        if shapes not in found:
            found.clear()  # one group's weights at a time
            adapters[shapes] = [_adapter(session, n, k) for n, k in shapes]
            found[shapes] = sides(session, shapes, adapters[shapes])
        rows.append(compare_groups(session, shapes, m, backward, found[shapes], adapters[shapes]))


def _adapter(session: Session, n: int, k: int) -> Adapter:
    a = normal(RANK, k, dtype=torch.float32, device=session.device) / k**0.5
    b = normal(n, RANK, dtype=torch.float32, device=session.device) * 0.02
    return a.requires_grad_(), b.requires_grad_()


def sides(session: Session, shapes: Sequence[Shape], adapters: list[Adapter]) -> dict[str, tuple[str, list[Layers]]]:
    """Every side by name: what it shares its weights with, and one call for each copy of them."""
    cache = session.limits().cache_bytes

    def copies(nbytes: int) -> int:
        return max(2, min(math.ceil(2 * cache / max(nbytes, 1)), MOST_COPIES))

    made: dict[str, tuple[str, list[Layers]]] = {}
    for name, kind in (("ours", STORED), ("ours_symmetric", SYMMETRIC)):
        weights = [kind.random(n, k, session.device) for n, k in shapes]
        count = copies(sum(weight.nbytes for weight in weights))
        made[name] = name, [_ours([clone(w) for w in weights], adapters) for _ in range(count)]
        if name == "ours":
            dense = [decode(weight, session.dtype) for weight in weights]
            few = copies(sum(weight.nbytes for weight in dense))
            made["cublas"] = name, [partial(_dense, [w.clone() for w in dense], adapters) for _ in range(few)]
            made["dequantise_cublas"] = name, [partial(_decoded, weights, adapters)] * 2
    if not missing_peers():
        pairs = [nf4_pair(n, k, session.dtype, session.device) for n, k in shapes]
        count = copies(sum(ours.nbytes for *_, ours in pairs))
        made["ours_nf4"] = "nf4", [_ours([clone(ours) for *_, ours in pairs], adapters) for _ in range(count)]
        states = [[(packed.clone(), state) for packed, state, _ in pairs] for _ in range(count)]
        made["bitsandbytes"] = "nf4", [partial(_bitsandbytes, copy, adapters) for copy in states]
    return made


def _ours(weights: list[Int4Weight], adapters: list[Adapter]) -> Layers:
    operands = [LoraOperand(weight, None, *pair, SCALING) for weight, pair in zip(weights, adapters, strict=True)]
    return lambda x: int4_lora_linears(x, operands, "triton")


def _with_adapter(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    a, b = (part.to(x.dtype) for part in adapter)
    return y + x @ a.t() @ b.t() * SCALING


def _dense(weights: list[Tensor], adapters: list[Adapter], x: Tensor) -> list[Tensor]:
    return [_with_adapter(x @ w.t(), x, pair) for w, pair in zip(weights, adapters, strict=True)]


def _decoded(weights: list[Int4Weight], adapters: list[Adapter], x: Tensor) -> list[Tensor]:
    """The usual way: decodes whole weights to 16 bits, forward and, by ``_Decoded``, once more backward."""
    return [_with_adapter(_Decoded.apply(x, w), x, pair) for w, pair in zip(weights, adapters, strict=True)]


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int4Weight) -> Tensor:
        ctx.weight = weight
        return x @ _whole(weight, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy @ _whole(ctx.weight, dy.dtype), None


def _whole(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    return decode_rows_triton(weight, torch.empty(weight.shape, dtype=dtype, device=weight.device))


def _bitsandbytes(weights: list[tuple[Tensor, Any]], adapters: list[Adapter], x: Tensor) -> list[Tensor]:
    import bitsandbytes

    ys = [bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state) for packed, state in weights]
    return [_with_adapter(y, x, pair) for y, pair in zip(ys, adapters, strict=True)]


def compare_groups(
    session: Session,
    shapes: Sequence[Shape],
    m: int,
    backward: bool,
    found: dict[str, tuple[str, list[Layers]]],
    adapters: list[Adapter],
) -> dict[str, Any]:
    """Checks the sides of one group against each other, then times them in turns."""
    x = normal(m, shapes[0][1], dtype=session.dtype, device=session.device).requires_grad_(backward)
    dys = [normal(m, n, dtype=session.dtype, device=session.device) for n, _ in shapes]
    leaves = [x, *(part for pair in adapters for part in pair)]

    def run(layers: Layers, x: Tensor) -> Sequence[Tensor]:
        if backward:
            return torch.autograd.grad(layers(x), leaves, dys)
        with torch.no_grad():
            return layers(x)

    row: dict[str, Any] = {"shapes": [list(shape) for shape in shapes], "m": m, "gradients": backward, "rank": RANK}
    firsts: dict[str, Sequence[Tensor]] = {}
    for name, (same, calls) in found.items():
        results = run(calls[0], x)
        for result, first in zip(results, firsts.setdefault(same, results), strict=True):
            if not close(result, first, SAME[session.dtype]):
                session.fail(f"{name} computes something else than the others: {row}")
                return row | {"wrong": name}
    calls = {name: [partial(run, one) for one in each] for name, (_, each) in found.items()}
    samples = in_turns(calls, x, session.timer(), session.sizes.samples)
    row["median_us"] = {name: statistics.median(values) for name, values in samples.items()}
    return row | {"samples_us": samples}
