"""The passes of one optimizer step: micro-batches go forward and backward through the model; numbers are checked."""

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
    """One optimizer step, a line of ``metrics.jsonl``. ``loss`` is the mean over its ``tokens`` targets, in nats.

    Attributes:
        skipped: nothing was updated, since there were no targets or something was not finite.
        not_finite: what was not finite; ``loss`` is None then.
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
    """What one optimizer step works on.

    Attributes:
        step: its number, from 0.
        micro_batches: this process's, on the device.
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
    """What a step found: the mean loss, the token accuracy, and the norm of the gradients (None without any)."""

    loss: float
    token_accuracy: float
    grad_norm: float | None


class Passes:
    """Runs the micro-batches of a step through a model that ``mebp_triton.load`` made.

    Args:
        model: with an adapter.
        processes: that train together.
        check_each_loss: look at the loss before its backward pass, which may update parameters at once.
    """

    def __init__(self, model: Any, processes: Processes, check_each_loss: bool = False) -> None:
        self.model, self.processes, self.check_each_loss = model, processes, check_each_loss
        self.device: torch.device = model.mebp.device

    def forward_and_backward(self, inputs: StepInputs) -> tuple[float, float]:
        """Loss and token accuracy over the micro-batches of all processes; gradients of this process's own.

        Raises:
            NotFinite: the loss is not.
        """
        return self._run(inputs, backward=True)

    @torch.no_grad()
    def forward(self, inputs: StepInputs, seed: int) -> tuple[float, float]:
        """Loss and token accuracy over the micro-batches of all processes, drawing random numbers from ``seed`` on.

        Raises:
            NotFinite: the loss is not.
        """
        torch.manual_seed(self.processes.seed(seed))
        return self._run(inputs, backward=False)

    def _run(self, inputs: StepInputs, backward: bool) -> tuple[float, float]:
        one_pass = self.model.mebp.loss
        loss, correct = 0.0, 0
        random_state = RandomState(self.device)
        with self._normalized(inputs.tokens):
            for batch in inputs.micro_batches:
                output = self.model(**batch, use_cache=False)
                if self.check_each_loss:
                    self._check_loss(output.loss.item(), inputs, random_state)
                if backward and output.loss.requires_grad:
                    output.loss.backward()
                loss += output.loss.item()
                correct += one_pass.statistics.correct
                # Frees what waits for the backward pass before the next micro-batch keeps its own.
                del output
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
        """``random_state``: from before the micro-batches ran, so that running them again draws the same numbers."""
        if math.isfinite(loss):
            return
        random_state.put_back()
        place = broken_parameter(self.model) or broken_output(self.model, inputs.micro_batches)
        if place is None:
            place = "in the loss itself" + ("" if self.processes.size == 1 else ", or in another process")
        raise NotFinite(f"loss is {loss} at step {inputs.step}, first {place}")

    def check_gradients(self, norm: float, step: int) -> None:
        """NotFinite where ``norm``, that of some or all gradients, is not finite; it names the first broken one."""
        if math.isfinite(norm):
            return
        broken = broken_gradient(self.model)
        if broken is None:
            problem = "every gradient is finite, but the sum of their squares overflows"
            raise NotFinite(f"gradient norm is {norm} at step {step}: {problem}")
        raise NotFinite(f"gradient norm is {norm} at step {step}, first {broken}")
