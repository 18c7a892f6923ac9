"""Follows a text through a source while its blocks are quantized one by one.

A block's inputs are those that the blocks below it give as they are stored. So each block makes up for a part of what
the rounding of those below it has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mebp_triton.kernels.compensation import compensation
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.discover import shared_inputs
from mebp_triton.models.experts import FusedExperts, fused_experts
from mebp_triton.models.skeleton import Int4Site, int4_sites
from mebp_triton.system.machine import available_memory_bytes

from .expert_inputs import expert_inputs
from .layer_inputs import Columns, LayerInputs
from .source_run import SourceRun

FLOAT_BYTES = 4


class Calibration:
    """The inputs of a source's linear layers, block by block.

    Args:
        run: the source and the text.
        most_bytes: what the products of a block's inputs may take, with the work on the widest of them; by default half
            of the memory that is available.
    """

    def __init__(self, run: SourceRun, most_bytes: int | None = None) -> None:
        self.run = run
        groups = _groups(run)
        self._whole = _fitting(groups, run.path, available_memory_bytes() // 2 if most_bytes is None else most_bytes)
        self._leader = {site.name: group[0] for group in groups for site in group}
        self._last = len(run.stream.runner.blocks) - 1
        self._inputs: dict[str, LayerInputs] | None = None
        self._latest: tuple[LayerInputs, Tensor] | None = None

    @contextmanager
    def block(self) -> Iterator[None]:
        """While active, the next block is the one whose layers are asked about. Then the text moves on through it."""
        with self.run.block():
            yield
            self._inputs = self._latest = None
            if self.run.stream.next < self._last:  # nothing is asked about what comes behind
                self.run.stream.advance()

    def columns(self, name: str) -> Columns:
        """The knowledge of a matrix's columns that rounding takes: none of one that is no layer of the block.

        A layer that the text never reaches has nothing either, and without the products of pairs no factor.
        """
        inputs = self.inputs(name)
        if inputs is None:
            return Columns()
        if not inputs.whole:
            return Columns(inputs.squares())
        if self._latest is None or self._latest[0] is not inputs:
            self._latest = None  # there are never two
            self._latest = inputs, compensation(inputs.sums)
        return Columns(inputs.squares(), self._latest[1])

    def inputs(self, name: str) -> LayerInputs | None:
        """The inputs of a layer of the block; None for one that the text never reaches, and for other matrices."""
        if name not in self._leader or not name.startswith(self.run.prefix):
            return None
        if self._inputs is None:
            self._inputs = self._collected()
        found = self._inputs[self._leader[name].name]
        return found if found.tokens else None

    def replace(self, name: str, weight: Int4Weight) -> None:
        """Lets the text move on through the matrix ``name`` as it is stored, if it lies in the block."""
        if name.startswith(self.run.prefix):
            self.run.weights.put(f"{name}.weight", weight)

    def _collected(self) -> dict[str, LayerInputs]:
        """Runs the block on the text. The keys are the first of the layers that read the same inputs."""
        sites = {site.name: site for site in self._leader.values() if site.name.startswith(self.run.prefix)}
        found = {name: LayerInputs(site.in_features, name in self._whole) for name, site in sites.items()}

        def hook_of(inputs: LayerInputs) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, arguments: inputs.add(arguments[0])

        def expert_hook_of(experts: FusedExperts) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(part: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                for name, rows in expert_inputs(part, experts, *arguments[:2]):
                    found[name].add(rows)

            return add

        layers = {name: self.run.model.get_submodule(name) for name in found if sites[name].role == "linear"}
        hooks = [layer.register_forward_pre_hook(hook_of(found[name])) for name, layer in layers.items()]
        for experts in fused_experts(self.run.model):
            if experts.matrix(0, "down_proj") in found:
                part = self.run.model.get_submodule(experts.path)
                hooks.append(part.register_forward_pre_hook(expert_hook_of(experts)))
        try:
            self.run.stream.pass_through()
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _groups(run: SourceRun) -> list[list[Int4Site]]:
    """The linear layers and the experts' matrices of the blocks, by what they read."""
    groups: list[list[Int4Site]] = []
    with contextlib.suppress(ValueError):  # the model's code does not run without data
        groups = shared_inputs(run.model.config)
    found = {site.name for group in groups for site in group}
    sites = (site for site in int4_sites(run.model)[0] if not site.is_table)
    groups += [[site] for site in sites if site.name not in found]  # experts, which the run without data leaves out
    return [group for group in groups if group[0].name.startswith(f"{run.path}.")]


def _fitting(groups: list[list[Int4Site]], path: str, most: int) -> set[str]:
    """The first layers of the groups whose products of pairs fit into ``most`` bytes: a block's narrowest go first."""
    fitting, taken = set(), dict[str, int]()
    for leader in sorted((group[0] for group in groups), key=lambda site: site.in_features):
        block = leader.name.removeprefix(f"{path}.").partition(".")[0]
        size = FLOAT_BYTES * leader.in_features**2
        # The work on one of them takes twice its size on top.
        if taken.get(block, 0) + 3 * size <= most:
            taken[block] = taken.get(block, 0) + size
            fitting.add(leader.name)
    return fitting
