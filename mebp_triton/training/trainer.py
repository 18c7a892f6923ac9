"""The training loop: batches become steps, steps become metrics and checkpoints, and a run can be resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.blocks.selection import LayerCyclicManager
from mebp_triton.data.batching import batches_per_epoch, valid_tokens
from mebp_triton.data.packing import PackedData, check_packing
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.models.config import check_vocabulary
from mebp_triton.system.errors import Interrupted, NotFinite
from mebp_triton.system.memory import MemoryWatch, peak_resident_bytes
from mebp_triton.system.random_state import RandomState

from .checkpoint import Checkpoint, Position, store_fingerprint
from .course import Course
from .evaluation import Evaluation
from .interim import InterimEvaluations
from .processes import ALONE, Processes
from .run_directory import RunDirectory
from .run_settings import RunSettings
from .step import StepInputs, StepResult
from .updates import make_update

MOST_SKIPPED = 10  # steps in a row that may be skipped, since their loss or gradients are not finite


class Trainer:
    """Trains the adapter of a model that ``mebp_triton.load`` made.

    Args:
        model: a model with an adapter.
        data: the training examples.
        config: the run's settings; ``run_settings.resolve`` makes them.
        run: the directory of the results.
        pad_token_id: any token; padding is masked.
        processes: the processes that train together, each with such a trainer.

    Attributes:
        course, total_steps: the batches of a step, and the optimizer steps of the whole run.
        parameters: those that are trained.
        interim: the evaluations during the training.
        stopped: what ``should_stop`` returned when it ended ``train``; else 0.
        planned_peak_bytes: the plan's prediction, for ``run.json``.

    Raises:
        ValueError: the model does not fit the data or the settings, or processes were given different files.
    """

    def __init__(
        self,
        model: Any,
        data: TokenizedData,
        config: RunSettings,
        run: RunDirectory,
        pad_token_id: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        # Whatever refuses the run comes first: neither the model nor the disk is changed then.
        if processes.size > 1 and config.optimizer_in_backward:
            raise ValueError(
                "optimizer_in_backward steps before the gradients of other processes are there: leave it out, or "
                "train with one process"
            )
        if isinstance(data, PackedData):
            check_packing(model)
        check_vocabulary(model.config, data, "the training data")
        self.model, self.data, self.config, self.run = model, data, config, run
        self.pad_token_id, self.processes = pad_token_id, processes
        self.device: torch.device = model.mebp.device
        self.selection = LayerCyclicManager(
            model,
            ratio=1.0 if config.selection_mode == "full" else config.selected_ratio,
            mode=config.selection_mode,
            schedule=config.selection_schedule,
            seed=config.seed,
        )
        run.create()
        self.update, self.parameters = make_update(config, model, self.selection, processes, run.directory)
        self.watch = MemoryWatch(self.device)
        per_epoch = batches_per_epoch(len(data), config.per_device_train_batch_size)
        self.course = Course(per_epoch, config.gradient_accumulation_steps * processes.size)
        self.total_steps = self.course.total_steps(config)
        self.position = Position()
        self.stopped = 0
        self.planned_peak_bytes: int | None = None
        self.interim = InterimEvaluations(model, config, run, processes)
        fingerprints = {"training data": data.checksum(), "model": store_fingerprint(model.mebp.store)}
        for what, checksum in fingerprints.items():
            if not processes.same(checksum):
                raise ValueError(f"the {what} is not the same in all processes: give each the same files")
        self.checkpoint = Checkpoint(model, self.update, self.selection, config, run, processes, fingerprints)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.position.step

    def resume(self, directory: Path) -> None:
        """Goes on from a checkpoint, to the same numbers as an uninterrupted run. See ``Checkpoint.resume``."""
        self.position = self.checkpoint.resume(directory, self.course)
        self.position.standing = self.interim.resume(self.position.standing)

    @property
    def finished(self) -> bool:
        """Whether no step is left to take: all are taken, or the evaluations have not improved for too long."""
        return self.step >= self.total_steps or self.position.standing.is_over(self.config)

    def train(
        self,
        on_step: Callable[[StepResult], None] = lambda result: None,
        should_stop: Callable[[], int] = lambda: 0,
        evaluate: Callable[[], Evaluation] | None = None,
        on_evaluated: Callable[[int, Evaluation, bool], None] = lambda step, found, best: None,
    ) -> list[StepResult]:
        """Runs to the last step, and writes metrics and checkpoints.

        Args:
            on_step: called after every step.
            should_stop: asked after every step. If any process returns something other than 0, all end there with a
                checkpoint, and the highest value becomes ``stopped``.
            evaluate: makes an evaluation, after every ``eval_steps`` steps. ``Interrupted`` ends the training like
                ``should_stop``; when the run is resumed, the evaluation comes first. One of several processes must
                not raise it alone.
            on_evaluated: called with (steps taken, what was found, whether it is the best so far).

        Returns:
            The results of the steps that this call took.

        Raises:
            FileError: another process writes into the run directory.
            NotFinite: a loss or a gradient is not finite, and the step may not be skipped.
        """
        self.stopped = 0
        self.interim.evaluate, self.interim.on_evaluated = evaluate, on_evaluated
        with self.run.writing():
            if self.step == 0:
                torch.manual_seed(self.processes.seed(self.config.seed))
            self.model.train()
            results = list(self._steps(on_step, should_stop))
            self.model.eval()
            return results

    def _steps(self, on_step: Callable[[StepResult], None], should_stop: Callable[[], int]) -> Iterator[StepResult]:
        place = self.step, self.processes, self.pad_token_id
        stream = self.course.micro_batches(self.data, self.config, *place, self._joins_micro_batches)
        if self._evaluate_if_due() and (self.finished or self.stopped):
            self.checkpoint.save(self.position)
        self._forget_measurements()
        recorded = min(self.step + 1, self.total_steps - 1)  # the second step: the first one warms up
        while not self.finished and not self.stopped:
            micro_batches = [self._on_device(batch) for batch in next(stream)]
            with self._watched() if self.step == recorded else contextlib.nullcontext():
                result = self._one_step(micro_batches)
            self.position.step += 1
            self.selection.advance()
            self.run.append_metrics(asdict(result) | self._measured())
            on_step(result)
            self.stopped = int(*self.processes.highest(should_stop()))
            if not self.stopped:
                self._evaluate_if_due()
            if self.stopped or self.step % self.config.save_steps == 0 or self.finished:
                self.checkpoint.save(self.position)
            yield result

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Labels stay in host memory, where they are counted and checked without waiting for the device."""
        return {name: x if name == "labels" else x.to(self.device) for name, x in batch.items()}

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """While active, memory is sampled after each pass of a block."""
        engine = self.model.mebp.engine
        before, engine.observer = engine.observer, self.watch
        try:
            yield
        finally:
            engine.observer = before

    def _joins_micro_batches(self) -> bool:
        """Whether the micro-batches of the next step go through the model as one, whose blocks take them in chunks."""
        engine = self.model.mebp.engine
        chunks = engine.block_rows is not None and engine.row_places is not None
        return self.config.join_micro_batches and chunks

    def _evaluate_if_due(self) -> bool:
        """Makes the evaluation that is due after this step, if any; says whether it did."""
        try:
            made = self.interim.run_if_due(self.position.standing, self.step)
        except Interrupted as interruption:
            self.stopped = interruption.number
            return False
        if made:
            self._forget_measurements()
        return made

    def _forget_measurements(self) -> None:
        """Resets waiting times and block counts: those of an evaluation must not count for the next step."""
        engine = self.model.mebp.engine
        engine.waiting.pop_seconds()
        engine.waiting.pop_paged()
        engine.waiting.pop_experts()
        engine.counters.pop_counts()

    def _measured(self) -> dict[str, Any]:
        """Returns what the step took, for its line in ``metrics.jsonl``."""
        engine = self.model.mebp.engine
        waited = engine.waiting.pop_seconds()
        measured = {"seconds_waiting_for_data": waited, "bytes_paged": engine.waiting.pop_paged()}
        if experts := engine.waiting.pop_experts():
            measured["experts_paged"] = experts
        measured["peak_rss_bytes"] = peak_resident_bytes()
        measured |= {f"blocks_{name}": count for name, count in engine.counters.pop_counts().items()}
        if self.processes.size > 1:
            measured["reduced_bytes"] = self.update.reduced_bytes
        return measured

    def _one_step(self, micro_batches: list[dict[str, Tensor]]) -> StepResult:
        """Takes one step, or skips it: where no process has a target, or where something is not finite."""
        started, step = time.perf_counter(), self.step
        rate = self.course.rate(self.config, step)
        tokens = int(*self.processes.sum(sum(valid_tokens(batch) for batch in micro_batches)))
        selected = sorted(self.selection.selected)
        if tokens == 0:
            return StepResult(step, 0.0, 0.0, 0, None, rate, time.perf_counter() - started, selected, True)
        random_state = RandomState(self.device)
        loss, accuracy, norm, not_finite = None, 0.0, None, None
        try:
            loss, accuracy, norm = self.update.apply(StepInputs(step, micro_batches, tokens, rate, selected))
            self.position.skipped_in_a_row = 0
        except NotFinite as error:
            not_finite = str(error)
            self._skip_or_raise(error, random_state)
        seconds = time.perf_counter() - started
        skipped = not_finite is not None
        return StepResult(step, loss, accuracy, tokens, norm, rate, seconds, selected, skipped, not_finite)

    def _skip_or_raise(self, error: NotFinite, random_state: RandomState) -> None:
        """Skips the step, or raises NotFinite with a line that says what is kept and how to go on."""
        for parameter in self.parameters:
            parameter.grad = None
        self.position.skipped_in_a_row += 1
        stops = self.config.on_nan == "stop"
        if not stops and self.position.skipped_in_a_row <= MOST_SKIPPED:
            return
        kept = self.checkpoint.keep_before_step(self.position, random_state)
        way = "lower the learning rate, or compute in float32, in a new run"
        if stops and self.update.undone:
            way += ", or resume with on_nan 'skip'"
        raise NotFinite(f"{error}: {way}; {kept}") from None
