"""The routes of a launch that dispatch chooses among, each callable by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mebp_triton.autotune.cases import tile_name
from mebp_triton.autotune.measure import panels
from mebp_triton.kernels.configs import PANEL, Kernel, Panel, Problem, TileConfig, default_config
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.matmul import int4_matmul_triton
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_triton
from mebp_triton.kernels.panel import int4_matmul_dx_panel, int4_matmul_panel
from mebp_triton.kernels.tables import Route, architecture_of, load_tables

from .sizes import Shape


def run_forward(route: Route) -> Callable[..., Tensor]:
    """Returns ``functions.int4_matmul`` with a fixed route."""

    def run(x: Tensor, weight: Int4Weight, bias: Any = None, t: Any = None, b: Any = None, **_: Any) -> Tensor:
        if isinstance(route, Panel):
            return int4_matmul_panel(x, weight, bias, t, b, True, route.elements)
        return int4_matmul_triton(x, weight, bias, t, b, route)

    return run


def run_dx(route: Route) -> Callable[..., Tensor]:
    """Returns ``functions.int4_matmul_dx`` with a fixed route."""

    def run(dy: Tensor, weight: Int4Weight, g: Any = None, a: Any = None, **_: Any) -> Tensor:
        if isinstance(route, Panel):
            return int4_matmul_dx_panel(dy, weight, g, a, True, route.elements)
        return int4_matmul_dx_triton(dy, weight, g, a, route)

    return run


def route_name(route: Route) -> str:
    """A route in one line: "panel" for panels of the size that runs without measurements."""
    if isinstance(route, Panel):
        return "panel" if route == PANEL else f"panel {route.mib} MiB"
    return tile_name(route)


def known_routes(
    device: torch.device, kernel: Kernel, shapes: Iterable[Shape], dtype: torch.dtype
) -> list[tuple[Shape, Route]]:
    """Pairs of shape and route: panels, the defaults, and each configuration of the device's tables that suits."""
    tables = load_tables(architecture_of(device))
    found = []
    for n, k in shapes:
        problem = Problem(kernel, 16, n, k, dtype=dtype)
        configs = dict.fromkeys(default_config(Problem(kernel, m, n, k, dtype=dtype)) for m in (16, 512))
        for entry in tables.values():
            if entry.problem.kernel == kernel and _suits(entry.route, problem):
                configs[entry.route] = None
        found += [((n, k), route) for route in (*panels(problem), *configs)]
    return found


def _suits(route: Route, problem: Problem) -> TypeGuard[TileConfig]:
    return isinstance(route, TileConfig) and route.suits(problem)
