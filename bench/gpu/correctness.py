"""Part ``correctness``: checks every operation at real shapes against float64 on the decoded codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from compiled import random_units
from torch import Tensor

from mebp_triton.autotune.correctness import check
from mebp_triton.autotune.measure import poisoned
from mebp_triton.kernels import functions
from mebp_triton.kernels.accuracy import judge, normal, random_weight
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import FORMS, Form
from mebp_triton.kernels.reference import decode
from mebp_triton.training.gradient_check import (
    KINDS,
    OTHER_KINDS,
    Kind,
    check_embedding,
    check_head,
    check_lora_layer,
)

from .operands import dtype_name, strided
from .routes import known_routes, route_name, run_dx, run_forward
from .session import Session
from .sizes import Shape

RANKS = (16, 0, 1, 64, 5)


def correctness(session: Session) -> None:
    _linear(session)
    _groups(session)
    _lora_layer(session)
    _embedding(session)
    _cross_entropy(session)
    _routes(session)
    _compiled(session)
    _repeats(session)


@dataclass(frozen=True)
class Case:
    """One kind of weight, and the numbers of tokens to check it with."""

    shape: Shape
    kind: Kind
    dtype: torch.dtype
    tokens: tuple[int, ...]


def cases(session: Session) -> list[Case]:
    """First every kind and dtype once, on the first shape; then the usual kind with every M and shape; then the rest.

    A fault of a kind shows at any size, and the time may end before all sizes are through.
    """
    sizes = session.sizes
    narrow = [Kind(form) for form in FORMS if form.bits == 4]
    kinds = list(product(dict.fromkeys([*KINDS, *narrow, *OTHER_KINDS]), sizes.dtypes))
    usual, step = (Kind(Form("symmetric", 64)), sizes.dtypes[0]), min(4, len(sizes.tokens))
    first, *others = sizes.shapes
    found = [Case(first, *kind, sizes.tokens[index % step :: step]) for index, kind in enumerate(kinds)]
    found += [Case(shape, *usual, sizes.tokens) for shape in sizes.shapes]
    for turn, shape in enumerate(others, 1):
        for index, kind in enumerate(kinds):
            if kind != usual:
                found.append(Case(shape, *kind, sizes.tokens[(turn + index) % step :: step]))
    return found


def _linear(session: Session) -> None:
    """Checks forward and dX, with bias and LoRA, by the routes that dispatch chooses."""
    rows = session.results["linear"] = []
    turn = 0
    for case in session.while_time("linear", cases(session), share=0.55):
        weight = case.kind.random(*case.shape, session.device)
        decoded = Decoded(weight, case.dtype)
        for m in case.tokens:
            for kernel in ("matmul", "matmul_dx"):
                turn += 1
                row = check_linear(decoded, kernel, m, RANKS[turn % len(RANKS)], turn % 3 == 0, turn % 4 == 0)
                _record(session, rows, {"kernel": kernel, **_describe(case.shape, weight, case.dtype), "m": m}, row)


class Decoded:
    """A weight, decoded in float64 and in the activations' dtype."""

    def __init__(self, weight: Int4Weight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.truth, self.same = decode(weight), decode(weight, dtype)


def check_linear(
    decoded: Decoded,
    kernel: str,
    m: int,
    rank: int,
    bias: bool,
    transposed: bool,
    run: Callable[..., Tensor] | None = None,
) -> dict[str, Any]:
    """Checks one forward or dX.

    Args:
        kernel: "matmul" or "matmul_dx".
        transposed: the activations' rows are not contiguous.
        run: takes the place of the operation, for a fixed route.
    """
    dtype, device, (n, k) = decoded.dtype, decoded.weight.device, decoded.weight.shape
    inputs, outputs = (k, n) if kernel == "matmul" else (n, k)
    make = strided if transposed else normal
    x = make(m, inputs, dtype=dtype, device=device)
    low = normal(m, rank, dtype=dtype, device=device) if rank else None
    high = normal(*((n, rank) if kernel == "matmul" else (rank, k)), dtype=dtype, device=device) if rank else None
    if high is not None:
        high *= 0.02 * (inputs / rank) ** 0.5  # in training, LoRA's term is smaller than the weight's
    added = normal(n, dtype=dtype, device=device) if bias and kernel == "matmul" else None
    with poisoned():
        if kernel == "matmul":
            ours = (run or functions.int4_matmul)(x, decoded.weight, added, low, high, backend="triton")
        else:
            ours = (run or functions.int4_matmul_dx)(x, decoded.weight, low, high, backend="triton")

    def expected(matrix: Tensor) -> Tensor:
        to = matrix.dtype
        y = x.to(to) @ (matrix.t() if kernel == "matmul" else matrix)
        if low is not None and high is not None:
            y = y + low.to(to) @ (high.t() if kernel == "matmul" else high).to(to)
        return y if added is None else y + added.to(to)

    assert ours.shape == (m, outputs) and ours.dtype == dtype
    found = judge(ours, expected(decoded.same), expected(decoded.truth))
    return {"rank": rank, "bias": added is not None, "transposed": transposed} | found


def _groups(session: Session) -> None:
    """Checks weights that share their input, as q/k/v and gate/up do: one launch forward, and one for dX."""
    rows = session.results["groups"] = []
    todo = list(product(session.sizes.group_shapes, session.sizes.dtypes, session.sizes.tokens[:5]))
    for shapes, dtype, m in session.while_time("groups", todo, share=0.25):
        weights = [random_weight(n, k, session.device) for n, k in shapes]
        x = normal(m, shapes[0][1], dtype=dtype, device=session.device)
        dys = [normal(m, n, dtype=dtype, device=session.device) for n, _ in shapes]
        t = normal(m, 16 * len(shapes), dtype=dtype, device=session.device)
        b = normal(sum(n for n, _ in shapes), 16, dtype=dtype, device=session.device)
        with poisoned():
            ys = functions.int4_matmul_group(x, weights, None, t, b, backend="triton")
            dx = functions.int4_matmul_dx_group(dys, weights, backend="triton")
        about = {"shapes": shapes, "dtype": dtype_name(dtype), "m": m}
        members = zip(ys, weights, t.split(16, dim=1), b.split([n for n, _ in shapes]), strict=True)
        for index, (y, weight, low, high) in enumerate(members):
            both = (dtype, torch.float64)
            same, truth = (x.to(to) @ decode(weight, to).t() + low.to(to) @ high.to(to).t() for to in both)
            found = judge(y, same, truth)
            _record(session, rows, about | {"kernel": "matmul", "member": index}, found)
        # The product over the concatenation, so that torch rounds once as well.
        dy, whole = (
            torch.cat(dys, dim=1),
            [torch.cat([decode(w, to) for w in weights]) for to in (dtype, torch.float64)],
        )
        _record(session, rows, about | {"kernel": "matmul_dx"}, judge(dx, dy @ whole[0], dy.double() @ whole[1]))


def _lora_layer(session: Session) -> None:
    """Checks the layer's output and all its gradients."""
    rows = session.results["lora_layer"] = []
    tokens = [m for m in session.sizes.tokens if m][:2]
    todo = [(session.sizes.shapes[0], kind, dtype, tokens[0]) for kind, dtype in product(KINDS, session.sizes.dtypes)]
    todo += product(session.sizes.shapes[:4], KINDS[:1], session.sizes.dtypes, tokens)
    for shape, kind, dtype, m in session.while_time("lora_layer", todo, share=0.3):
        weight = kind.random(*shape, session.device)
        about = {**_describe(shape, weight, dtype), "m": m}
        with poisoned():
            checked = check_lora_layer(weight, dtype, m, backend="triton")
        for name, row in checked.items():
            _record(session, rows, about | {"gradient": name}, row)


def _embedding(session: Session) -> None:
    """Checks that rows are decoded to the bit."""
    rows = session.results["embedding"] = []
    v, k = session.sizes.table
    todo = list(product([*KINDS, *OTHER_KINDS], session.sizes.dtypes))
    for kind, dtype in session.while_time("embedding", todo, share=0.3):
        weight = kind.random(v, k, session.device)
        with poisoned():
            ok = check_embedding(weight, dtype, session.sizes.table_tokens, backend="triton")
        _record(session, rows, _describe((v, k), weight, dtype), {"ok": ok})


def _cross_entropy(session: Session) -> None:
    """Checks loss and dH over an int4 head."""
    rows = session.results["cross_entropy"] = []
    v, k = session.sizes.table
    todo = list(product(KINDS[:3], session.sizes.dtypes))
    for kind, dtype in session.while_time("cross_entropy", todo, share=0.4):
        weight = kind.random(v, k, session.device)
        with poisoned():
            loss, true_loss, found = check_head(weight, dtype, session.sizes.table_tokens, backend="triton")
        about = _describe((v, k), weight, dtype) | {"loss": loss, "true_loss": true_loss}
        _record(session, rows, about, found)


def _route_cases(session: Session) -> Iterator[tuple[str, Shape, Any]]:
    for kernel in ("matmul", "matmul_dx"):
        for shape, route in known_routes(session.device, kernel, session.sizes.shapes[:2], session.dtype):
            yield kernel, shape, route


def _routes(session: Session) -> None:
    """Checks every route that a launch may take: each configuration of the tables, the defaults, panels."""
    rows = session.results["routes"] = []
    for kernel, shape, route in session.while_time("routes", list(_route_cases(session)), share=0.6):
        weight = random_weight(*shape, session.device)
        decoded = Decoded(weight, session.dtype)
        run = (run_forward if kernel == "matmul" else run_dx)(route)
        for m in [m for m in session.sizes.tokens if m][:3]:
            found = check_linear(decoded, kernel, m, 16, False, False, run)
            about = {"kernel": kernel, "route": route_name(route), **_describe(shape, weight, session.dtype), "m": m}
            _record(session, rows, about, found)


def _compiled(session: Session) -> None:
    """Runs problems that ``bench/compiled.py`` executes without a GPU, judged alike: tiles and layouts of all kinds."""
    rows = session.results["compiled"] = []
    cases = [unit.case for unit in random_units() if unit.case.dtype in session.sizes.dtypes]
    for case in session.while_time("compiled", cases[: session.sizes.cases], share=0.6):
        verdict = check(case, session.device)
        share = verdict.share if math.isfinite(verdict.share) else None
        what = {"case": str(case), "dtype": dtype_name(case.dtype)}
        _record(session, rows, what, {"ok": verdict.ok, "share": share, "reason": verdict.reason})


def _repeats(session: Session) -> None:
    """Checks that one call gives the same bits again and again."""
    rows = session.results["repeats"] = []
    for kernel, shape, route in session.while_time("repeats", list(_route_cases(session))):
        weight = random_weight(*shape, session.device)
        for m in [m for m in session.sizes.tokens if m][:2]:
            x = normal(m, shape[1] if kernel == "matmul" else shape[0], dtype=session.dtype, device=session.device)
            run = (run_forward if kernel == "matmul" else run_dx)(route)
            first = run(x, weight)
            different = sum(not torch.equal(run(x, weight), first) for _ in range(session.sizes.repeats))
            about = {"kernel": kernel, "route": route_name(route), **_describe(shape, weight, session.dtype), "m": m}
            _record(
                session, rows, about, {"repeats": session.sizes.repeats, "different": different, "ok": not different}
            )


def _describe(shape: Shape, weight: Int4Weight, dtype: torch.dtype) -> dict[str, Any]:
    two_level = weight.super_scales is not None
    return {"n": shape[0], "k": shape[1], **weight.form._asdict(), "two_level": two_level, "dtype": dtype_name(dtype)}


def _record(session: Session, rows: list[dict[str, Any]], about: dict[str, Any], found: dict[str, Any]) -> None:
    rows.append(about | found)
    if not found["ok"]:
        session.fail(f"beyond the rule: {about | found}")
