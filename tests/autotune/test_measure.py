"""Measuring: what is rejected, and what is timed over which buffers, by clocks that tests set."""

from dataclasses import replace

import interpreted
import pytest
import torch
from interpreted import triton_kernels  # noqa: F401 - a fixture, used by its name
from triton.runtime.errors import OutOfResources

from mebp_triton.autotune import measure
from mebp_triton.autotune.measure import (
    Bench,
    bytes_moved,
    flops,
    panels,
    plan,
    poisoned,
    workspace_bytes,
)
from mebp_triton.autotune.timing import Limits
from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig, default_config
from mebp_triton.kernels.names import SCHEMES

DEVICE = torch.device(interpreted.DEVICE)
LIMITS = Limits(cache_bytes=1 << 16, memory_bytes=1 << 30)
KERNELS = ("matmul", "matmul_dx")


def problem_of(kernel="matmul", m=33, n=80, k=136, scheme="symmetric", group_size=32, dtype=torch.float32):
    return Problem(kernel, m, n, k, scheme, group_size, dtype)


def bench(problem=None, copies=3, limits=LIMITS):
    return Bench(problem or problem_of(), copies, DEVICE, limits)


class ToldTimer:
    """Runs nothing. Returns ``first`` for the two runs that do not count, then ``samples``."""

    def __init__(self, samples, first=1000.0):
        self.samples, self.first, self.runs = list(samples), first, 0

    def __call__(self, run):
        self.runs += 1
        return self.first if self.runs <= 2 else self.samples.pop(0)


# --- right and wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_panel_route_is_right(kernel, scheme, dtype):
    assert bench(problem_of(kernel, m=150, scheme=scheme, dtype=dtype)).reject(PANEL) is None


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tile_is_right(kernel):
    wide = replace(problem_of(kernel, m=5, group_size=16), bits=8)
    for problem in (problem_of(kernel), problem_of(kernel, m=5, scheme="affine", dtype=torch.float16), wide):
        assert bench(problem).reject(default_config(problem)) is None


def drop_a_chunk(y, x, weight):
    return y - x[:, -8:] @ measure.decode(weight, x.dtype)[:, -8:].t()


ALL_BUT_1 = torch.tensor([0, *range(2, 300)])
PLANTED = {
    "a chunk dropped": drop_a_chunk,
    "one element off": lambda y, x, w: y.index_put((torch.tensor(0), torch.tensor(3)), y[0, 3] + y.abs().max() * 1e-5),
    "a little too large": lambda y, x, w: y * (1 + 1e-5),
    "the last row wrong": lambda y, x, w: torch.cat((y[:-1], y[:1])),
    "a column not written": lambda y, x, w: torch.empty_like(y).index_copy_(1, torch.arange(79), y[:, :79]),
    # Row 1 of 300 is not among the compared rows.
    "a row not written": lambda y, x, w: torch.empty_like(y).index_copy_(0, ALL_BUT_1, y[ALL_BUT_1]),
    "another shape": lambda y, x, w: y[:, :-1],
    "another dtype": lambda y, x, w: y.half(),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_wrong_numbers_are_rejected(monkeypatch, name):
    real = measure.int4_matmul_panel

    def wrong(x, weight, *operands):
        return PLANTED[name](real(x, weight, *operands), x, weight)

    made = bench(problem_of(m=300))
    assert made.reject(PANEL) is None and 1 not in made.rows
    monkeypatch.setattr(measure, "int4_matmul_panel", wrong)
    assert made.reject(PANEL).startswith("wrong: ")
    # A rejected route is never timed.
    found = made.measure(PANEL, ToldTimer([]))
    assert found.time_us is None and found.reason.startswith("wrong: ")


def test_what_is_not_written_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.empty(1000).isnan().all() and torch.empty(1000, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize(
    "error", [OutOfResources(300_000, 101_376, "shared memory"), RuntimeError("PassManager::run failed\nand more")]
)
def test_what_does_not_run_has_a_reason(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(measure, "int4_matmul_panel", fail)
    found = bench().measure(PANEL, ToldTimer([]))
    assert found.time_us is None and found.reason.startswith(f"{type(error).__name__}: ") and "\n" not in found.reason


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def fail(*arguments):
        raise ValueError("a mistake")

    monkeypatch.setattr(measure, "int4_matmul_panel", fail)
    with pytest.raises(ValueError, match="a mistake"):
        bench().reject(PANEL)


def test_a_workspace_that_is_too_large_is_never_tried():
    problem = problem_of(m=64, n=4096)
    config = TileConfig(16, 16, 64, split=16)
    assert workspace_bytes(problem, config) == 16 * 64 * 4096 * 4
    made = bench(problem, limits=Limits(1 << 16, 1 << 24))
    made.run = None  # a call would fail
    assert made.reject(config) == "needs 16 MiB beside its output"


# --- timing ---------------------------------------------------------------------------------------------------------


def test_the_median_per_call():
    found = bench().measure(PANEL, ToldTimer([30_000.0, 10_000.0, 20_000.0], first=8000.0))
    assert (found.time_us, found.samples_us, found.reason) == (20_000.0, (30_000.0, 10_000.0, 20_000.0), None)


def test_short_calls_are_timed_together():
    found = bench().measure(PANEL, ToldTimer([40.0 * 50] * 99, first=80.0))
    assert found.time_us == pytest.approx(40.0) and len(found.samples_us) == 15
    found = bench().measure(PANEL, ToldTimer([10.0 * 64] * 99, first=2.0))
    assert found.time_us == pytest.approx(10.0)
    # Long calls are repeated less often.
    assert len(bench().measure(PANEL, ToldTimer([8000.0] * 99, first=16_000.0)).samples_us) == 4


def test_stops_early_when_clearly_worse():
    made = bench()
    found = made.measure(PANEL, ToldTimer([9000.0] * 20, first=9000.0), best_us=1000.0)
    assert len(found.samples_us) == 2 and found.reason == "clearly slower than the best before it"
    # One slow sample, or being a little slower, is no reason to stop.
    for samples in ([9000.0, 1000.0] + [12_000.0] * 9, [1200.0] * 20):
        found = made.measure(PANEL, ToldTimer(samples, first=9000.0), best_us=1000.0)
        assert len(found.samples_us) > 2 and found.reason is None


def test_every_call_takes_the_next_buffers(monkeypatch):
    problem = problem_of(m=2)
    made = bench(*plan(problem, LIMITS))
    assert made.copies * bytes_moved(problem) >= 2 * LIMITS.cache_bytes
    seen, real = [], measure.int4_matmul_panel

    def watched(x, weight, *rest):
        y = real(x, weight, *rest)
        seen.append((x.data_ptr(), weight.packed.data_ptr(), weight.scales.data_ptr(), y.data_ptr()))
        return y

    monkeypatch.setattr(measure, "int4_matmul_panel", watched)
    made.turn(PANEL, 2 * made.copies)
    for part in zip(*seen[: made.copies], strict=True):
        assert len(set(part)) == made.copies
    assert [row[:3] for row in seen[: made.copies]] == [row[:3] for row in seen[made.copies :]]


def test_bytes_and_operations():
    problem = problem_of("matmul", 16, 128, 100, "affine", 32, torch.float16)
    assert bytes_moved(problem) == 128 * 64 + 2 * 2 * 4 * 128 + 2 * 16 * 228
    assert bytes_moved(replace(problem, bits=8)) == 128 * 128 + 2 * 2 * 4 * 128 + 2 * 16 * 228
    assert flops(problem) == 2 * 16 * 128 * 100


def test_panels_up_to_one_that_holds_the_weight():
    assert panels(Problem("matmul", 512, 4096, 2048)) == [Panel(16)]
    assert panels(Problem("matmul", 512, 4096, 2112)) == [Panel(16), Panel(64)]
    assert panels(Problem("matmul_dx", 512, 11008, 4096)) == [Panel(16), Panel(64)]


def test_panels_are_decoded_by_kernels_where_the_operations_do_so():
    """Then a panel has the size that is measured, and else that of torch's own panels."""
    problem, seen = problem_of(n=64, k=128), []

    def told(x, weight, bias, t, b, by_kernel, elements):
        seen.append((by_kernel, elements))

    made = bench(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "int4_matmul_panel", told)
        made.run(Panel(64))
        made.by_kernel = True
        made.run(Panel(64))
    assert seen == [(False, None), (True, 64 << 19)]
    assert workspace_bytes(problem, Panel(64)) - workspace_bytes(problem, Panel(16)) == 4 * (48 << 20)


def test_copies_fit_into_memory_and_at_last_m_is_halved():
    problem = problem_of(m=4096, n=4096, k=4096, dtype=torch.float16)
    one, fixed = bytes_moved(problem), 32 * 2**20 + 6 * measure.CHUNK_BYTES + workspace_bytes(problem, Panel(64))
    assert plan(problem, Limits(10 * one, 1 << 40)) == (problem, 20)
    assert plan(problem, Limits(10 * one, fixed + 5 * one)) == (problem, 5)
    smaller, copies = plan(problem, Limits(10 * one, fixed + one))
    assert smaller.m == 2048 and copies >= 2
    assert plan(problem, Limits(0, 1 << 40)) == (problem, 2)
    with pytest.raises(ValueError, match=r"4096x4096 needs \d+ MiB to be measured, and 100 MiB may be used"):
        plan(problem, Limits(1 << 20, 100 << 20))
