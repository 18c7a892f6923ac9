"""Part ``compile``: compiles what the later parts launch, on all cores at once, into the cache where launches look."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mebp_triton.autotune.compile import blank_launch
from mebp_triton.kernels.configs import TUNED, Kernel, Problem, TileConfig
from mebp_triton.kernels.routing import find_route
from mebp_triton.kernels.tables import Route, architecture_of, load_tables
from mebp_triton.training.gradient_check import KINDS, OTHER_KINDS, Kind

from .routes import known_routes
from .session import Session
from .sizes import STORED, SYMMETRIC

RANK = 16


class Unit(NamedTuple):
    """One launch to compile for; see ``blank_launch``."""

    problem: Problem
    config: Any
    two_level: bool
    members: int
    bias: bool


class Target:
    """Stands for Triton's driver in a process that compiles and has no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"sm_{self.capability}, which is not here"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compilation(session: Session) -> None:
    todo, capability = list(dict.fromkeys(units(session))), _capability(session.device)
    session.results |= {"units": len(todo), "capability": capability, "processes": os.cpu_count()}
    if session.on_gpu:
        started = time.monotonic()
        session.results["compiled"] = compile_all(session, todo, capability)
        session.results["seconds"] = round(time.monotonic() - started, 1)
    else:
        # The interpreter, in which a rehearsal runs, compiles nothing.
        session.results["compiled"] = 0


def compile_all(session: Session, todo: list[Unit], capability: int) -> int:
    """Compiles in one process for each core; a unit that does not compile is a failure. Returns how many were."""
    done = 0
    with ProcessPoolExecutor(os.cpu_count(), initializer=_become, initargs=(capability,)) as pool:
        waiting = {pool.submit(compile_unit, unit): unit for unit in todo}
        try:
            for future in as_completed(waiting, timeout=max(session.seconds_left(), 1.0)):
                if error := future.exception():
                    session.fail(f"{waiting[future]}: {type(error).__name__}: {str(error)[:300]}")
                else:
                    done += 1
        except TimeoutError:
            session.results["left_out"] = {"units": len(todo) - done - len(session.failures)}
            pool.shutdown(wait=False, cancel_futures=True)
    return done


def _become(capability: int) -> None:
    driver.set_active(Target(capability))


def compile_unit(unit: Unit) -> str:
    """Does all of a launch but the launch itself; returns the hash by which a launch finds what was compiled."""
    problem, config, two_level, members, bias = unit
    scale_dtype = torch.int8 if two_level else torch.float16
    function, arguments = blank_launch(problem, config, RANK, bias, scale_dtype, members)
    return str(function.warmup(grid=(1,), **arguments, **config.launch_options()).hash)


def units(session: Session) -> Iterator[Unit]:
    """The launches of the later parts: whole steps and timed products first, then kinds, then single routes."""
    sizes, table = session.sizes, load_tables(architecture_of(session.device))
    tokens = dict.fromkeys([*sizes.sequence_lengths, *sizes.speed_tokens])

    def unit(
        kernel: Kernel, m: int, k: int, ns: list[int], kind: Kind, dtype: torch.dtype, bias: bool
    ) -> Iterator[Unit]:
        scheme, group, bits = kind.form
        whole = Problem(kernel, m, sum(ns), k, scheme, group, dtype, bits)
        route: Route = find_route(whole, table)
        if isinstance(route, TileConfig):
            yield Unit(_alike(whole, ns[0]), route, kind.two_level, len(ns), bias and kernel == "matmul")

    for kernel, m, group, kind in product(TUNED, tokens, sizes.speed_groups, (STORED, SYMMETRIC)):
        for bias in (True, False):
            yield from unit(kernel, m, group[0][1], [n for n, _ in group], kind, session.dtype, bias)
    for kernel, m, kind, dtype in product(TUNED, sizes.tokens, [*KINDS, *OTHER_KINDS], sizes.dtypes):
        n, k = sizes.shapes[0]
        if m:
            yield from unit(kernel, m, k, [n], kind, dtype, False)
    for kernel in TUNED:
        for (n, k), route in known_routes(session.device, kernel, sizes.shapes[:1], session.dtype):
            if isinstance(route, TileConfig):
                problem = Problem(kernel, 512, n, k, dtype=session.dtype)
                yield Unit(problem, route, False, 1, False)


def _alike(problem: Problem, n: int) -> Problem:
    """A problem that the same compiled kernel serves: of M, only whether 16 divides it, and whether it is 1, matter."""
    m = 16 if problem.m % 16 == 0 else min(problem.m, 3)
    return Problem(problem.kernel, m, n, problem.k, *problem.form[:2], problem.dtype, problem.bits)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor
