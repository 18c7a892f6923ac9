"""Which implementation runs an operation: Triton or plain torch, and with Triton by which route."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .configs import MIN_DOT, PANEL, Kernel, Panel, Problem, TileConfig, default_config
from .layout import Int4Weight
from .names import BACKENDS, SCHEMES
from .tables import Route, Table, architecture_of, bucket, load_tables

Result = TypeVar("Result")

# From so many tokens of an expert on, panels of the single experts' weights may be taken.
MANY_OF_EXPERT = 1024


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Literal["triton", "panel"]:
    """The backend that ``backend`` means for this device and dtype.

    Raises:
        ValueError: the backend is unknown, or cannot run here.
    """
    if backend == "auto":
        by_triton = device.type == "cuda" and has_triton() and dtype != torch.float64
        # Before sm_80 there are no bfloat16 instructions.
        if by_triton and dtype == torch.bfloat16 and torch.version.hip is None:
            by_triton = torch.cuda.get_device_capability(device) >= (8, 0)
        return "triton" if by_triton else "panel"
    if backend == "panel":
        return "panel"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed; use 'panel'")
    if device.type == "cpu" and not architecture_of(device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' runs on a GPU, and the tensors are on the CPU; use 'panel' or 'auto'")
    return "triton"


class Routes:
    """Which route each launch on one architecture takes.

    Attributes:
        table: what was tuned for it.
        too_large: configurations that a device turned out to have no room for, and which are not chosen again.
        choose: ``find`` of a problem, remembered, since every launch asks.

    Args:
        tensor_cores: whether its products are those of tensor cores, see ``default_route``.
        find: ``find_route``, or ``find_expert_route`` for launches over experts.
    """

    def __init__(
        self, table: Table, tensor_cores: bool = True, find: Callable[[Problem, Table, bool], Route] | None = None
    ) -> None:
        self.table, self.tensor_cores, self.find = table, tensor_cores, find or find_route
        self.too_large: set[TileConfig] = set()
        self.choose = functools.lru_cache(maxsize=4096)(self._choose)

    def _choose(self, problem: Problem) -> Route:
        route = self.find(problem, self.table, self.tensor_cores)
        return default_config(problem) if route in self.too_large else route

    @functools.cached_property
    def over_experts(self) -> Routes:
        """The routes of launches over experts, by the same table."""
        return Routes(self.table, self.tensor_cores, find_expert_route)

    def refuse(self, problem: Problem) -> None:
        """Makes ``choose`` give the default from now on, wherever it gave the configuration that this problem got.

        Raises:
            ValueError: it was the default already: there is nothing else.
        """
        route = self.choose(problem)
        if isinstance(route, Panel) or route == default_config(problem):
            raise ValueError(f"even the default configuration {route} does not fit this device for {problem}")
        self.too_large.add(route)
        self.choose.cache_clear()


@functools.cache
def routes_of(architecture: str) -> Routes:
    """The routes of an architecture, for the whole process. Its tables are read at the first launch, not on import."""
    old = re.fullmatch(r"sm_(\d+)", architecture)
    return Routes(load_tables(architecture), tensor_cores=old is None or int(old[1]) >= 80)


def find_route(problem: Problem, table: Table, tensor_cores: bool = True) -> Route:
    """The route that a table gives a problem.

    It is the entry for the problem's bucket, or for the nearest bucket of N and K with all else equal. If there is
    none, an entry for the other 16-bit dtype stands in, then one for another group size, scheme or width of codes. If
    no entry is for the kernel and the number of tokens, ``default_route`` decides.
    """
    wanted = bucket(problem)
    candidates = [item for item in table if _may_stand_in(item, wanted)]
    if not candidates:
        return default_route(problem, tensor_cores)
    route = table[min(candidates, key=lambda item: _distance(item, wanted))].route
    if isinstance(route, TileConfig) and not route.suits(problem):
        return replace(route, scale_sums=False)  # the weight does not let sums be scaled
    return route


def find_expert_route(problem: Problem, table: Table, tensor_cores: bool = True) -> Route:
    """The route of a launch over experts, for the problem that ``Experts.problem`` makes of it: not split.

    A table knows whether panels are faster for one weight. Those of an expert are small, and there are many: each takes
    two launches and more. So tiles have most of the problems, if the table has any for so many tokens.
    """
    route = find_route(problem, table, tensor_cores)
    if isinstance(route, Panel) and problem.m < MANY_OF_EXPERT:
        tiles = {item: entry for item, entry in table.items() if isinstance(entry.route, TileConfig)}
        route = find_route(problem, tiles, tensor_cores)
    return route if isinstance(route, Panel) else replace(route, split=1)


def _may_stand_in(item: Problem, wanted: Problem) -> bool:
    """Whether an entry may serve the wanted problem at all: float32 and 16 bits never stand in for each other."""
    wide = item.dtype == torch.float32, wanted.dtype == torch.float32
    return (item.kernel, item.m) == (wanted.kernel, wanted.m) and wide[0] == wide[1]


def _distance(item: Problem, wanted: Problem) -> tuple[Any, ...]:
    """How far an entry's problem is from the wanted one: the weightiest difference first, sizes by ratio."""
    size = abs(math.log2(item.n / wanted.n)) + abs(math.log2(item.k / wanted.k))
    other_group = abs(math.log2(item.group_size / wanted.group_size))
    other_scheme = 0 if item.scheme == wanted.scheme else 1 + SCHEMES.index(item.scheme)
    return (
        item.bits != wanted.bits,
        other_scheme,
        other_group,
        item.dtype != wanted.dtype,
        size,
        item.n,
        item.k,
        item.group_size,
    )


def default_route(problem: Problem, tensor_cores: bool = True) -> Route:
    """The route without a table.

    Few tokens go by tiles. From 512 on, where no public fused kernel keeps up with a library, they go by panels; and
    from 17 on without tensor_cores: before sm_80 the compiler multiplies without them, and the library with them.
    """
    if problem.m >= 512 or (problem.m > MIN_DOT and not tensor_cores):
        return PANEL
    return default_config(problem)


def _out_of_resources() -> type[Exception]:
    """The error of a launch for which a device has no room."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def routed(kernel: Kernel, operand: Tensor, weights: Sequence[Int4Weight], launch: Callable[[Route], Result]) -> Result:
    """Launches by the route that the tables give. A route that the device has no room for is not taken again."""
    from .launch import group_of

    group = group_of(weights)
    assert group is not None
    problem = group.problem(kernel, operand.shape[0], operand.dtype)
    return _by_route(problem, routes_of(architecture_of(operand.device)), launch)


def routed_over_experts(problem: Problem, device: torch.device, launch: Callable[[Route], Result]) -> Result:
    """Does what ``routed`` does, for the problem that ``Experts.problem`` makes.

    Buckets stand for problems, of which there are many: the numbers of tokens and of chosen experts change.
    """
    return _by_route(bucket(problem), routes_of(architecture_of(device)).over_experts, launch)


def _by_route(problem: Problem, routes: Routes, launch: Callable[[Route], Result]) -> Result:
    try:
        return launch(routes.choose(problem))
    except _out_of_resources() as error:
        warnings.warn(f"{routes.choose(problem)} does not fit this device ({error}): tune again", stacklevel=2)
        routes.refuse(problem)
    return launch(routes.choose(problem))
