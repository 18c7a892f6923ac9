"""Part ``speed``: times products against cuBLAS, dequantise + cuBLAS, and bitsandbytes.

First layers with one input and their adapters (``groups``), as a step runs them, forward and backward. Then forward and
dX of one weight without LoRA and bias. Each call takes the next of several copies of its weight, so that the cache
holds none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels import functions
from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.configs import TUNED, Problem
from mebp_triton.kernels.embedding import decode_rows_triton
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.routing import routes_of
from mebp_triton.kernels.tables import architecture_of

from .groups import grouped
from .operands import clone, close, dtype_name, nf4_pair
from .routes import route_name, run_dx, run_forward
from .session import Session
from .sizes import Shape
from .timed import MOST_COPIES, SAME, Call, Side, in_turns, missing_peers


def speed(session: Session) -> None:
    session.results["dtype"] = dtype_name(session.dtype)
    session.results["not_run"] = missing_peers()
    grouped(session, share=0.7)
    rows = session.results["rows"] = []
    for shape in session.sizes.speed_shapes:
        weights = Weights.make(session, shape)
        left = len(session.sizes.speed_shapes) - session.sizes.speed_shapes.index(shape)
        todo = list(product(session.sizes.speed_tokens, TUNED))
        for m, kernel in session.while_time(f"{shape[0]}x{shape[1]}", todo, share=1 / left):
            rows.append(compare(session, weights, kernel, m))


@dataclass(frozen=True)
class Weights:
    """Copies of one random weight for every side; the copies of each kind are together twice as large as the cache."""

    shape: Shape
    plain: list[Tensor]
    ours: list[Int4Weight]
    nf4: list[tuple[Tensor, Any, Int4Weight]]

    @classmethod
    def make(cls, session: Session, shape: Shape) -> Weights:
        first = random_weight(*shape, session.device)
        copies = max(2, min(math.ceil(2 * session.limits().cache_bytes / first.nbytes), MOST_COPIES))
        decoded = decode(first, session.dtype)
        few = max(2, min(math.ceil(2 * session.limits().cache_bytes / decoded.nbytes), MOST_COPIES))
        nf4 = []
        if not missing_peers():
            packed, state, ours = nf4_pair(*shape, session.dtype, session.device)
            nf4 = [(packed.clone(), state, clone(ours)) for _ in range(copies)]
        return cls(shape, [decoded.clone() for _ in range(few)], [clone(first) for _ in range(copies)], nf4)

    def sides(self, kernel: str) -> dict[str, Side]:
        forward = kernel == "matmul"
        run = run_forward if forward else run_dx
        op = functions.int4_matmul if forward else functions.int4_matmul_dx
        sides = {
            "cublas": Side([_times(w, forward) for w in self.plain], "int4"),
            "ours": Side([partial(_ours, op, w) for w in self.ours], "int4"),
            "ours_panel": Side([partial(_ours, run(None), w) for w in self.ours], "int4"),
            "dequantise_cublas": Side([partial(_dequantised, forward, w) for w in self.ours], "int4"),
        }
        if self.nf4:
            sides["ours_nf4"] = Side([partial(_ours, op, w) for _, _, w in self.nf4], "nf4")
            sides["bitsandbytes"] = Side([_bitsandbytes(p, s, forward) for p, s, _ in self.nf4], "nf4")
        return sides


def _ours(op: Callable[..., Tensor], weight: Int4Weight, x: Tensor) -> Tensor:
    return op(x, weight, backend="triton")


def _times(weight: Tensor, forward: bool) -> Call:
    return lambda x: x @ (weight.t() if forward else weight)


def _dequantised(forward: bool, weight: Int4Weight, x: Tensor) -> Tensor:
    """The usual way: decodes the whole weight to 16 bits, then calls the library."""
    whole = decode_rows_triton(weight, torch.empty(weight.shape, dtype=x.dtype, device=x.device))
    return x @ (whole.t() if forward else whole)


def _bitsandbytes(packed: Tensor, state: Any, forward: bool) -> Call:
    """Returns ``matmul_4bit``, or for dX the product of its backward pass without the costs of autograd."""
    import bitsandbytes
    from bitsandbytes import functional

    if forward:
        return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    return lambda dy: torch.matmul(dy, functional.dequantize_4bit(packed, state).to(dy.dtype))


def bitsandbytes_dx(dy: Tensor, packed: Tensor, state: Any) -> Tensor:
    """dX by bitsandbytes' own autograd function."""
    import bitsandbytes

    x = torch.zeros(dy.shape[0], state.shape[1], dtype=dy.dtype, device=dy.device, requires_grad=True)
    (dx,) = torch.autograd.grad(bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state), x, dy)
    return dx


def compare(session: Session, weights: Weights, kernel: str, m: int) -> dict[str, Any]:
    """Checks all sides against each other on one problem, then times them in turns."""
    (n, k), dtype = weights.shape, session.dtype
    x = normal(m, k if kernel == "matmul" else n, dtype=dtype, device=session.device)
    sides = weights.sides(kernel)
    row: dict[str, Any] = {"kernel": kernel, "m": m, "n": n, "k": k}
    row["route"] = route_name(routes_of(architecture_of(session.device)).choose(Problem(kernel, m, n, k, dtype=dtype)))
    firsts: dict[str, Tensor] = {}
    if weights.nf4 and kernel == "matmul_dx":
        firsts["nf4"] = bitsandbytes_dx(x, *weights.nf4[0][:2])
    for name, side in sides.items():
        result = side.calls[0](x)
        if not close(result, firsts.setdefault(side.group, result), SAME[dtype]):
            session.fail(f"{name} computes something else than the others: {row}")
            return row | {"wrong": name}
    samples = in_turns({name: side.calls for name, side in sides.items()}, x, session.timer(), session.sizes.samples)
    row["bytes_moved"] = weights.ours[0].nbytes + m * (n + k) * dtype.itemsize
    row["flops"] = 2 * m * n * k
    row["median_us"] = {name: statistics.median(values) for name, values in samples.items()}
    row["samples_us"] = samples
    return row
