"""Measures a route on this device: its result is checked against float64, then it is timed.

Calls take turns over copies of the operands that outgrow the L2 cache. A route that does not compile, does not fit or
gives wrong numbers has a reason instead of a time.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.errors import TritonError

from mebp_triton.kernels.accuracy import judge, random_weight
from mebp_triton.kernels.configs import PANEL, Panel, Problem
from mebp_triton.kernels.layout import group_count, packed_columns
from mebp_triton.kernels.panel import int4_matmul_dx_panel, int4_matmul_panel
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.tables import Route

from .timing import Limits, Timer

# LoRA's rank. Training runs every layer with an adapter, so measurements do.
RANK = 16
# Calls in one sample. A device queues about a thousand launches, and a call by the panel route makes several.
WINDOW = 64
MOST_COPIES = 4096
SAMPLE_US = 2_000.0
BUDGET_US = 30_000.0
FEWEST_SAMPLES, MOST_SAMPLES = 3, 15
CLEARLY_WORSE = 1.25
CHECKED_ROWS = 96
TAIL_ROWS = 32
CHUNK_BYTES = 32 << 20
# Sizes of panels to measure, smallest first: one that most second-level caches hold, and one of fewer launches.
PANELS = (PANEL, Panel(64))


@dataclass(frozen=True)
class Measurement:
    """The measurement of one route.

    Attributes:
        time_us: median microseconds per call; None if it was not timed.
        samples_us: the samples that ``time_us`` is the median of.
        reason: why it was not timed, or not to the end; None otherwise.
    """

    time_us: float | None
    samples_us: tuple[float, ...] = ()
    reason: str | None = None


def weight_bytes(problem: Problem) -> int:
    """Bytes of a packed weight with scales and minima in float16."""
    scales = 2 * group_count(problem.k, problem.group_size) * problem.n
    return problem.n * packed_columns(problem.k, problem.bits) + scales * (2 if problem.scheme == "affine" else 1)


def bytes_moved(problem: Problem) -> int:
    """The fewest bytes that must be read and written: the weight, X and Y."""
    return weight_bytes(problem) + problem.m * (problem.n + problem.k) * problem.dtype.itemsize


def flops(problem: Problem) -> int:
    return 2 * problem.m * problem.n * problem.k


def panels(problem: Problem) -> list[Panel]:
    """The sizes of panels to measure: those of ``PANELS`` up to the first that holds the whole weight."""
    needed = [larger for panel, larger in itertools.pairwise(PANELS) if panel.elements < problem.n * problem.k]
    return [PANELS[0], *needed]


def workspace_bytes(problem: Problem, route: Route) -> int:
    """Bytes that a call allocates besides its output: partial results, or a panel and the input in its order."""
    if isinstance(route, Panel):
        return 4 * (route.mib << 20) + bytes_moved(replace(problem, n=0)) * 2
    out = problem.n if problem.kernel == "matmul" else problem.k
    return 0 if route.split == 1 else 4 * route.split * problem.m * out


def plan(problem: Problem, limits: Limits) -> tuple[Problem, int]:
    """The problem as it can be measured here, and how many copies of its operands take turns.

    The copies are twice as large as the cache if memory allows. As long as not even two of them fit, M is halved.

    Raises:
        ValueError: memory has no room for one row.
    """
    wanted = max(2, min(math.ceil(2 * limits.cache_bytes / bytes_moved(problem)), MOST_COPIES))
    while True:
        # The check needs the decoded weight and a few chunks in float64.
        check = problem.n * problem.k * problem.dtype.itemsize + 6 * CHUNK_BYTES
        room = limits.memory_bytes - check - workspace_bytes(problem, panels(problem)[-1])
        copies = min(wanted, room // bytes_moved(problem))
        if copies >= min(wanted, 2):
            return problem, copies
        if problem.m == 1:
            raise ValueError(
                f"{problem.n}x{problem.k} needs {check + 2 * bytes_moved(problem) >> 20} MiB to be measured, "
                f"and {limits.memory_bytes >> 20} MiB may be used: free some memory"
            )
        problem = replace(problem, m=problem.m // 2)


class Bench:
    """Random operands of one problem on a device, and the right result for the first copy of them.

    Args:
        problem, copies: as ``plan`` returns them.
        device: the device to run on.
        limits: the device's limits.
    """

    def __init__(self, problem: Problem, copies: int, device: torch.device, limits: Limits) -> None:
        self.problem, self.copies, self.device, self.limits = problem, copies, device, limits
        # The operations dispatch likewise: on a GPU, a kernel decodes the panels.
        self.by_kernel = device.type == "cuda"
        self.generator = torch.Generator(device).manual_seed(0)
        self.out_features = problem.n if problem.kernel == "matmul" else problem.k
        inputs = problem.k if problem.kernel == "matmul" else problem.n
        self.weights = [
            random_weight(
                problem.n,
                problem.k,
                device,
                problem.scheme,
                problem.group_size,
                generator=self.generator,
                bits=problem.bits,
            )
            for _ in range(copies)
        ]
        # [copies, M, K] or [copies, M, N]
        self.x = self._normal(copies, problem.m, inputs, dtype=problem.dtype)
        # LoRA's terms: t [M, R] and b [N, R], or g [M, R] and a [R, K].
        self.low = self._normal(problem.m, RANK, dtype=problem.dtype)
        turned = self._normal(self.out_features, RANK, dtype=problem.dtype)
        self.high = turned if problem.kernel == "matmul" else turned.t().contiguous()
        self.rows = self._checked_rows()
        self.truth, self.same = self._expected()
        self.outputs: list[Tensor | None] = [None] * copies
        self.next = 0

    def _normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def _checked_rows(self) -> Tensor:
        """The rows to check: some that are evenly spaced, and the last ones. Float64 is slow on most devices."""
        m = self.problem.m
        spread = torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).long()
        return torch.cat((spread, torch.arange(max(0, m - TAIL_ROWS), m))).unique().to(self.device)

    def _expected(self) -> tuple[Tensor, Tensor]:
        """The checked rows of the first copy's result, in float64 and as torch computes it in the problem's dtype."""
        weight, problem = self.weights[0], self.problem
        x, low = self.x[0][self.rows], self.low[self.rows]
        high = self.high.t() if problem.kernel == "matmul" else self.high
        truth = low.double() @ high.double()
        decoded = torch.empty(weight.shape, dtype=problem.dtype, device=self.device)
        step = max(1, CHUNK_BYTES // (8 * problem.k))
        for start in range(0, problem.n, step):
            part = slice(start, min(start + step, problem.n))
            rows = weight.rows(part.start, part.stop)
            decoded[part] = decode(rows, problem.dtype)
            if problem.kernel == "matmul":
                truth[:, part] += x.double() @ decode(rows).t()
            else:
                truth += x[:, part].double() @ decode(rows)
        same = x @ (decoded.t() if problem.kernel == "matmul" else decoded) + low @ high
        return truth, same

    def run(self, route: Route, copy: int = 0) -> Tensor:
        """Makes one call on one of the copies."""
        x, weight = self.x[copy], self.weights[copy]
        if self.problem.kernel == "matmul":
            if isinstance(route, Panel):
                elements = route.elements if self.by_kernel else None
                return int4_matmul_panel(x, weight, None, self.low, self.high, self.by_kernel, elements)
            from mebp_triton.kernels.matmul import int4_matmul_triton

            return int4_matmul_triton(x, weight, None, self.low, self.high, route)
        if isinstance(route, Panel):
            elements = route.elements if self.by_kernel else None
            return int4_matmul_dx_panel(x, weight, self.low, self.high, self.by_kernel, elements)
        from mebp_triton.kernels.matmul_dx import int4_matmul_dx_triton

        return int4_matmul_dx_triton(x, weight, self.low, self.high, route)

    def reject(self, route: Route) -> str | None:
        """Why ``route`` cannot be taken: it needs too much memory, does not run, or its numbers are wrong; or None."""
        needed = workspace_bytes(self.problem, route)
        if needed > self.limits.memory_bytes // 2:
            return f"needs {needed >> 20} MiB beside its output"
        try:
            with poisoned():
                result = self.run(route)
            self.synchronize()
        except (TritonError, RuntimeError) as error:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # raises again if the device itself is lost
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0][:160]}"
        return self._wrong(result)

    def _wrong(self, result: Tensor) -> str | None:
        """Returns the fault of a result, by the rule that the tests use; None if nothing is."""
        if tuple(result.shape) != (self.problem.m, self.out_features) or result.dtype != self.problem.dtype:
            return f"wrong: a result of shape {tuple(result.shape)} in {result.dtype}"
        if not bool(result.isfinite().all()):
            return "wrong: not finite, or not written"
        verdict = judge(result[self.rows], self.same, self.truth, product=True)
        return None if verdict["ok"] else f"wrong: {verdict['reason']}"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def turn(self, route: Route, calls: int) -> None:
        """Makes ``calls`` calls, each on the next copy. Outputs stay until their copy's next turn, so they move too."""
        for _ in range(calls):
            self.outputs[self.next] = self.run(route, self.next)
            self.next = (self.next + 1) % self.copies

    def measure(self, route: Route, timer: Timer, best_us: float = math.inf) -> Measurement:
        """Checks a route, then times it, and stops early if two samples are clearly worse than ``best_us``."""
        reason = self.reject(route)
        if reason is not None:
            return Measurement(None, reason=reason)
        warm_us = timer(lambda: self.turn(route, 2)) / 2
        calls = max(1, min(int(SAMPLE_US / max(warm_us, 1e-3)), WINDOW))
        timer(lambda: self.turn(route, calls))
        samples: list[float] = []
        while len(samples) < MOST_SAMPLES:
            samples.append(timer(lambda: self.turn(route, calls)) / calls)
            if len(samples) >= 2 and min(samples) > CLEARLY_WORSE * best_us:
                reason = "clearly slower than the best before it"
                break
            if len(samples) >= FEWEST_SAMPLES and sum(samples) * calls > BUDGET_US:
                break
        self.outputs = [None] * self.copies
        return Measurement(statistics.median(samples), tuple(samples), reason)


@contextmanager
def poisoned() -> Iterator[None]:
    """While active, ``torch.empty`` is filled with NaN, so that whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a deterministic form only warn
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
