"""The ways in which a step changes the parameters: after its backward pass, within it, or without one.

``UPDATES`` has a line for every value of the setting ``optim``, whose facts are in ``optimizers/table.py``.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mebp_triton.blocks.selection import LayerCyclicManager

from .optimizers.adamw import BlockAdamW, block_groups
from .optimizers.mezo import MeZO
from .optimizers.tensor_lists import clip, total_norm
from .processes import Processes
from .run_settings import RunSettings
from .step import Numbers, Passes, StepInputs


class Update(Protocol):
    """Takes one optimizer step, and knows what a checkpoint must keep of it.

    Attributes:
        undone: whether a step that raises NotFinite leaves the parameters as they were before it.
        state_groups: how many groups of optimizer state a checkpoint keeps, each in a file of its own.
        reduced_bytes: what the last step handed to all-reduce.
    """

    undone: bool
    state_groups: int
    reduced_bytes: int

    def apply(self, inputs: StepInputs) -> Numbers:
        """Runs the passes of a step and updates the parameters.

        Raises:
            NotFinite: a loss or a gradient is not finite.
        """
        ...

    def export_group(self, index: int) -> dict[str, Tensor]:
        """Returns a group's state on the CPU; these are views of the live state if it lies there."""
        ...

    def import_group(self, index: int, state: dict[str, Tensor]) -> None:
        """Loads what ``export_group`` returned. Raises ValueError if it is another model's."""
        ...

    def release_group(self, index: int) -> None:
        """Gives back the memory that reading or writing a group's state made resident."""
        ...


@dataclass(frozen=True)
class Parts:
    """The parts from which an update is built.

    Attributes:
        groups: trainable parameters block by block, see ``block_groups``.
        scratch: the directory for optimizer state in files.
    """

    settings: RunSettings
    groups: list[list[nn.Parameter]]
    passes: Passes
    selection: LayerCyclicManager
    processes: Processes
    scratch: Path

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group]


class _AdamWUpdate:
    """The common part of both ways to step AdamW: the optimizer, its state, and which groups a step trains."""

    undone = True

    def __init__(self, parts: Parts, eight_bit: bool) -> None:
        settings = parts.settings
        self.passes, self.selection, self.processes = parts.passes, parts.selection, parts.processes
        self.parameters = parts.parameters
        self.limit = settings.max_grad_norm or math.inf
        self.reduced_bytes = 0
        self.optimizer = BlockAdamW(
            parts.groups,
            weight_decay=settings.weight_decay,
            unselected_update=settings.unselected_update,
            residency=settings.optimizer_state,
            directory=parts.scratch,
            eight_bit=eight_bit,
        )
        self.state_groups = len(self.optimizer.param_groups)

    def _trained(self, inputs: StepInputs) -> frozenset[int]:
        """Returns the groups of the selected blocks, and those beyond the blocks, which are always trained."""
        return frozenset(inputs.selected) | frozenset(range(self.selection.count, self.state_groups))

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def export_group(self, index: int) -> dict[str, Tensor]:
        return self.optimizer.export_group(index, copy=False)

    def import_group(self, index: int, state: dict[str, Tensor]) -> None:
        self.optimizer.import_group(index, state)

    def release_group(self, index: int) -> None:
        self.optimizer.moments.drop(index)


class AfterBackward(_AdamWUpdate):
    """Steps all groups once the backward passes of all micro-batches are over."""

    def apply(self, inputs: StepInputs) -> Numbers:
        loss, accuracy = self.passes.forward_and_backward(inputs)
        groups, trained = self.optimizer.param_groups, self._trained(inputs)
        self.reduced_bytes = self.processes.sum_gradients([groups[index]["params"] for index in sorted(trained)])
        total = total_norm(self.parameters)
        compared = sorted(inputs.selected) if self.selection.schedule == "importance" else []
        own = [total_norm(groups[index]["params"]).to(total.device) for index in compared]
        # The only wait for the device between the passes and the next step, where moments lie there and none lag.
        norm, *norms = torch.stack([total, *own]).tolist()
        self.passes.check_gradients(norm, inputs.step)
        clip(self.parameters, self.limit, total, norm)
        if compared:
            self.selection.record_norms(dict(zip(compared, norms, strict=True)))
        self._set_rate(inputs.rate)
        self.optimizer.step(selected=trained)
        self.optimizer.zero_grad()
        return Numbers(loss, accuracy, norm)


class InBackward(_AdamWUpdate):
    """Steps each group as soon as its gradients are complete, and frees them: one group's exist at a time."""

    undone = False  # upper blocks have been stepped by the time a lower one's gradient is not finite

    def apply(self, inputs: StepInputs) -> Numbers:
        self._set_rate(inputs.rate)
        norm_of: dict[int, float] = {}

        def check(index: int, norm: float) -> None:
            self.passes.check_gradients(norm, inputs.step)
            norm_of[index] = norm

        with self.optimizer.step_in_backward(self._trained(inputs), self.limit, check) as norms:
            loss, accuracy = self.passes.forward_and_backward(inputs)
        self.optimizer.zero_grad()
        if self.selection.schedule == "importance":
            self.selection.record_norms({index: norm_of[index] for index in inputs.selected if index in norm_of})
        return Numbers(loss, accuracy, math.hypot(*norms))


class ZerothOrder:
    """Steps by the losses of two forward passes; nothing is kept from step to step."""

    undone = False  # the parameters are moved to and fro before the loss is known, which rounds them
    state_groups = 0
    reduced_bytes = 0

    def __init__(self, parts: Parts) -> None:
        self.passes, self.seed = parts.passes, parts.settings.seed
        self.mezo = MeZO(parts.parameters, parts.settings.mezo_epsilon, parts.settings.weight_decay)

    def apply(self, inputs: StepInputs) -> Numbers:
        # Were the two added, a run with the next seed would take the same directions one step earlier.
        seed = random.Random(f"{self.seed}:{inputs.step}").getrandbits(63)
        accuracies = []

        def forward() -> float:
            loss, accuracy = self.passes.forward(inputs, seed)
            accuracies.append(accuracy)
            return loss

        loss, _ = self.mezo.step(forward, inputs.rate, seed)
        return Numbers(loss, statistics.fmean(accuracies), None)

    def export_group(self, index: int) -> dict[str, Tensor]:
        raise IndexError(f"zeroth-order optimizers have no state group {index}")

    def import_group(self, index: int, state: dict[str, Tensor]) -> None:
        self.export_group(index)

    def release_group(self, index: int) -> None:
        self.export_group(index)


def adamw(parts: Parts, eight_bit: bool = False) -> Update:
    """Returns the update by AdamW: in the backward pass or after it, as ``optimizer_in_backward`` says."""
    kind = InBackward if parts.settings.optimizer_in_backward else AfterBackward
    return kind(parts, eight_bit)


UPDATES: dict[str, Callable[[Parts], Update]] = {
    "adamw": adamw,
    "adamw_8bit": functools.partial(adamw, eight_bit=True),
    "mezo": ZerothOrder,
}


def make_update(
    settings: RunSettings, model: Any, selection: LayerCyclicManager, processes: Processes, scratch: Path
) -> tuple[Update, list[nn.Parameter]]:
    """Returns the update that the settings ask for, and the parameters that it trains.

    Args:
        settings: the run's.
        model: a model that ``mebp_triton.load`` made, with an adapter.
        selection: says which blocks a step trains.
        processes: the processes that train together.
        scratch: the directory for optimizer state in files.
    """
    passes = Passes(model, processes, check_each_loss=settings.optimizer_in_backward)
    parts = Parts(settings, block_groups(model, model.mebp.engine), passes, selection, processes, scratch)
    return UPDATES[settings.optim](parts), parts.parameters
