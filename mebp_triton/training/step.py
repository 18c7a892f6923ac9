"""The passes of one optimizer step: its micro-batches go forward and backward, and its numbers are checked."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mebp_triton.system.errors import NotFinite
from mebp_triton.system.random_state import RandomState

from .nonfinite import broken_gradient, broken_output, broken_parameter
from .processes import Processes


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, a line of ``metrics.jsonl``.

    Attributes:
        loss: the mean over the step's ``tokens`` targets, in nats; None where something was not finite.
        grad_norm: the norm of all gradients before clipping; None where there were none.
        skipped: whether nothing was updated, since there were no targets or something was not finite.
        not_finite: what was not finite.
    """

    step: int
    loss: float | None
    token_accuracy: float
    tokens: int
    grad_norm: float | None
    learning_rate: float
    seconds: float
    selected_blocks: list[int]
    skipped: bool = False
    not_finite: str | None = None


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one optimizer step.

    Attributes:
        step: its number, from 0.
        micro_batches: those of this process, on the device.
        tokens: targets in the micro-batches of all processes; at least one.
        rate: the learning rate.
        selected: the blocks that are trained at this step.
    """

    step: int
    micro_batches: list[dict[str, Tensor]]
    tokens: int
    rate: float
    selected: list[int]


class Numbers(NamedTuple):
    """The mean loss of a step, its token accuracy, and the norm of its gradients (None if it has none)."""

    loss: float
    token_accuracy: float
    grad_norm: float | None


class Passes:
    """Runs the micro-batches of a step through a model that ``mebp_triton.load`` made.

    Args:
        model: a model with an adapter.
        processes: the processes that train together.
        check_each_loss: check a micro-batch's loss before its backward pass, which may update parameters at once.
    """

    def __init__(self, model: Any, processes: Processes, check_each_loss: bool = False) -> None:
        self.model, self.processes, self.check_each_loss = model, processes, check_each_loss
        self.device: torch.device = model.mebp.device

    def forward_and_backward(self, inputs: StepInputs) -> tuple[float, float]:
        """Returns loss and token accuracy over the micro-batches of all processes.

        Gradients are left in the parameters, and are those of this process's micro-batches alone.

        Raises:
            NotFinite: the loss is not finite.
        """
        return self._run(inputs, backward=True)

    @torch.no_grad()
    def forward(self, inputs: StepInputs, seed: int) -> tuple[float, float]:
        """Returns loss and token accuracy over the micro-batches of all processes.

        Args:
            inputs: the step's.
            seed: seeds the random numbers that dropout draws.

        Raises:
            NotFinite: the loss is not finite.
        """
        torch.manual_seed(self.processes.seed(seed))
        return self._run(inputs, backward=False)

    def _run(self, inputs: StepInputs, backward: bool) -> tuple[float, float]:
        one_pass = self.model.mebp.loss
        losses: list[Tensor] = []
        counted = []
        random_state = RandomState(self.device)
        with self._normalized(inputs.tokens):
            for batch in inputs.micro_batches:
                output = self.model(**batch, use_cache=False)
                if self.check_each_loss:
                    self._check_loss(output.loss.item(), inputs, random_state)
                if backward and output.loss.requires_grad:
                    output.loss.backward()
                losses.append(output.loss.detach())
                counted.append(one_pass.statistics)
                # Frees what waits for the backward pass before the next micro-batch keeps its own.
                del output
        # The numbers come from the device once all of its work is under way: to ask for one is to wait for it.
        loss = sum(torch.stack(losses).tolist()) if losses else 0.0
        correct = sum(statistics.correct for statistics in counted)
        loss, total = self.processes.sum(loss, correct)
        self._check_loss(loss, inputs, random_state)
        return loss, total / inputs.tokens

    @contextlib.contextmanager
    def _normalized(self, tokens: int) -> Any:
        """While active, losses are sums divided by ``tokens``, so that micro-batches add up to the step's mean."""
        self.model.mebp.loss.normalizer = tokens
        try:
            yield
        finally:
            self.model.mebp.loss.normalizer = None

    def _check_loss(self, loss: float, inputs: StepInputs, random_state: RandomState) -> None:
        """Raises NotFinite where ``loss`` is not finite, and names the first place where that shows.

        Finding the place takes another run of the micro-batches. It starts from ``random_state``, that from before
        their first run, so that dropout draws the same numbers.
        """
        if math.isfinite(loss):
            return
        random_state.put_back()
        place = broken_parameter(self.model) or broken_output(self.model, inputs.micro_batches)
        if place is None:
            place = "in the loss itself" + ("" if self.processes.size == 1 else ", or in another process")
        raise NotFinite(f"loss is {loss} at step {inputs.step}, first {place}")

    def check_gradients(self, norm: float, step: int) -> None:
        """Raises NotFinite where ``norm``, of some or all gradients, is not finite, and names the first broken one."""
        if math.isfinite(norm):
            return
        broken = broken_gradient(self.model)
        if broken is None:
            problem = "every gradient is finite, but the sum of their squares overflows"
            raise NotFinite(f"gradient norm is {norm} at step {step}: {problem}")
        raise NotFinite(f"gradient norm is {norm} at step {step}, first {broken}")
