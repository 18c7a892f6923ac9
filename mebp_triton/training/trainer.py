"""The training loop: batches -> gradients -> optimizer, with a run directory that can be resumed."""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.blocks.selection import LayerCyclicManager, gradient_norm
from mebp_triton.data.batching import batches, batches_per_epoch, collate, valid_tokens
from mebp_triton.data.packing import PackedData, check_packing
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.models.adapter import adapter_tensors, copy_adapter, save_adapter
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, errors, reading, safetensors_file, strict_json
from mebp_triton.system.errors import NotFinite, RunError
from mebp_triton.system.memory import MemoryWatch, peak_resident_bytes
from mebp_triton.training.optimizers.adamw import BlockAdamW, block_groups, total_norm
from mebp_triton.training.optimizers.mezo import MeZO
from mebp_triton.training.optimizers.schedules import learning_rate

from .evaluation import check_vocabulary
from .nonfinite import broken_gradient, broken_output, broken_parameter
from .processes import ALONE, Processes
from .run_directory import RunDirectory
from .settings import TrainConfig

# What a resumed run may change: none of these changes the numbers of a step, but for rounding on another device.
FREE_ON_RESUME = {"output_dir", "validation_file", "max_eval_windows", "weights", "checkpoints", "optimizer_state"}
FREE_ON_RESUME |= {"save_steps", "backend", "device", "recompute_granularity"}
FREE_ON_RESUME |= {"memory_budget", "return_freed_memory", "on_nan"}
MOST_SKIPPED = 10  # steps in a row whose loss or gradients are not finite
STATE = "state.safetensors"  # of a checkpoint: adapter and random state


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. ``loss`` is the mean over its ``tokens`` targets.

    ``skipped``: nothing was updated, as there were no targets, or as its loss (None then) or a gradient was not finite,
    which ``not_finite`` tells.
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


class Trainer:
    """Trains the adapter of a model that ``mebp_triton.load`` made.

    Args:
        model: with an adapter.
        data: the training examples.
        config: resolved settings, see ``TrainConfig.resolved``.
        run: where results go.
        pad_token_id: any token; padding is masked.
        processes: that train together, each with such a trainer.
    """

    def __init__(
        self,
        model: Any,
        data: TokenizedData,
        config: TrainConfig,
        run: RunDirectory,
        pad_token_id: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        if isinstance(data, PackedData):
            check_packing(model)
        if processes.size > 1 and config.optimizer_in_backward:
            raise ValueError(
                "optimizer_in_backward steps before the gradients of other processes are there: leave it out, or "
                "train with one process"
            )
        check_vocabulary(model, data, "the training data")
        self.processes = processes
        self.model, self.data, self.config, self.run, self.pad_token_id = model, data, config, run, pad_token_id
        self.device: torch.device = model.mebp.device
        self.selection = LayerCyclicManager(
            model,
            ratio=1.0 if config.selection_mode == "full" else config.selected_ratio,
            mode=config.selection_mode,
            schedule=config.selection_schedule,
            seed=config.seed,
        )
        run.create()
        groups = block_groups(model, model.mebp.engine)
        self.parameters = [parameter for group in groups for parameter in group]
        self.optimizer: BlockAdamW | None = None
        self.mezo: MeZO | None = None
        if config.optim == "mezo":
            self.mezo = MeZO(self.parameters, config.mezo_epsilon, config.weight_decay)
        else:
            assert config.optimizer_state is not None, "settings must be resolved"
            self.optimizer = BlockAdamW(
                groups,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                unselected_update=config.unselected_update,
                residency=config.optimizer_state,
                directory=run.directory,
                eight_bit=config.optim == "adamw_8bit",
            )
        self.watch = MemoryWatch(self.device)
        model.mebp.engine.observer = self.watch
        per_epoch = batches_per_epoch(len(data), config.per_device_train_batch_size)
        self.micro_batches_per_step = config.gradient_accumulation_steps * processes.size
        self.total_steps = config.max_steps or math.ceil(
            config.num_train_epochs * per_epoch / self.micro_batches_per_step
        )
        self.step = self.reduced_bytes = self.skipped_in_a_row = self.stopped = 0
        self.first_step = 0  # of ``metrics.jsonl``: a run may go on from another one's checkpoint
        self.planned_peak_bytes: int | None = None
        # What the losses of ``run.json`` are of.
        self.evaluated = {name: getattr(config, name) for name in ("validation_file", "max_eval_windows", "max_length")}
        self.fingerprints = {"training data": data.checksum(), "model": _store_checksum(model.mebp.store)}
        for what, checksum in self.fingerprints.items():
            if not processes.same(checksum):
                raise ValueError(f"the {what} is not the same in all processes: give each the same files")

    def train(
        self,
        on_step: Callable[[StepResult], None] = lambda result: None,
        should_stop: Callable[[], int] = lambda: 0,
    ) -> list[StepResult]:
        """Runs to the last step, writing metrics and checkpoints; the steps that this call made.

        Args:
            on_step: called after every step.
            should_stop: asked after every step. Where any process's is not 0, all end there, with a checkpoint, and
                the highest is ``stopped``.

        Raises:
            FileError: another process writes into the run directory.
        """
        with self.run.writing():
            return self._steps(on_step, should_stop)

    def _steps(self, on_step: Callable[[StepResult], None], should_stop: Callable[[], int]) -> list[StepResult]:
        config = self.config
        results: list[StepResult] = []
        if self.step == 0:
            torch.manual_seed(self.processes.seed(config.seed))
        self.model.train()
        stream = batches(
            self.data,
            config.per_device_train_batch_size,
            config.seed,
            start_batch=self.step * self.micro_batches_per_step,
            epochs=None if config.max_steps else config.num_train_epochs,
        )
        self.model.mebp.engine.waiting.pop_seconds()  # what evaluations waited for and ran is none of a step's
        self.model.mebp.engine.counters.taken()
        record_at = min(self.step + 1, self.total_steps - 1)  # the second step: the first one warms up
        while self.step < self.total_steps:
            micro_batches = self._micro_batches(stream)
            self.watch.recording = self.step == record_at
            result = self._one_step(micro_batches)
            self.watch.recording = False
            self.step += 1
            self.selection.advance()
            results.append(result)
            waited = self.model.mebp.engine.waiting.pop_seconds()
            taken = {"seconds_waiting_for_data": waited, "peak_rss_bytes": peak_resident_bytes()}
            taken |= {f"blocks_{name}": count for name, count in self.model.mebp.engine.counters.taken().items()}
            if self.processes.size > 1:
                taken["reduced_bytes"] = self.reduced_bytes
            self.run.append_metrics(asdict(result) | taken)
            on_step(result)
            self.stopped = int(*self.processes.highest(should_stop()))
            if self.stopped or self.step % config.save_steps == 0 or self.step == self.total_steps:
                self.save_checkpoint()
            if self.stopped:
                break
        self.model.eval()
        return results

    def _micro_batches(self, stream: Iterator[list[Any]]) -> list[dict[str, Tensor]]:
        """This process's part of the step's: every ``size``-th."""
        taken = islice(islice(stream, self.micro_batches_per_step), self.processes.rank, None, self.processes.size)
        collated = [collate(examples, self.pad_token_id) for examples in taken]
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in collated]

    def _one_step(self, micro_batches: list[dict[str, Tensor]]) -> StepResult:
        started = time.perf_counter()
        config = self.config
        rate = learning_rate(
            self.step, config.learning_rate, config.lr_scheduler_type, config.warmup_steps, self.total_steps
        )
        tokens = int(*self.processes.sum(sum(valid_tokens(batch) for batch in micro_batches)))
        selected = sorted(self.selection.selected)
        if tokens == 0:
            return StepResult(self.step, 0.0, 0.0, 0, None, rate, time.perf_counter() - started, selected, True)
        random_state = self._random_state()
        loss, accuracy, norm, why = None, 0.0, None, None
        try:
            loss, accuracy, norm = self._update(micro_batches, tokens, rate, selected)
            self.skipped_in_a_row = 0
        except NotFinite as error:
            for parameter in self.parameters:
                parameter.grad = None
            self.skipped_in_a_row += 1
            if config.on_nan == "stop" or self.skipped_in_a_row > MOST_SKIPPED:
                kept = self._keep_state_before_step(random_state)
                way = "lower the learning rate, or compute in float32, in a new run"
                if config.on_nan == "stop" and self.mezo is None and not config.optimizer_in_backward:
                    way += ", or resume with on_nan 'skip'"
                raise NotFinite(f"{error}: {way}; {kept}") from None
            why = str(error)
        seconds = time.perf_counter() - started
        return StepResult(self.step, loss, accuracy, tokens, norm, rate, seconds, selected, why is not None, why)

    def _update(
        self, micro_batches: list[dict[str, Tensor]], tokens: int, rate: float, selected: list[int]
    ) -> tuple[float, float, float | None]:
        """Loss, token accuracy, gradient norm. NotFinite before anything is updated, but for blocks in the backward."""
        if self.mezo is not None:
            # Neighbouring seeds must not share their directions one step apart.
            seed = random.Random(f"{self.config.seed}:{self.step}").getrandbits(63)
            accuracies = []

            def forward() -> float:
                value, share = self._forward(micro_batches, tokens, seed)
                accuracies.append(share)
                return value

            loss, _ = self.mezo.step(forward, rate, seed)
            return loss, statistics.fmean(accuracies), None
        if self.config.optimizer_in_backward:
            return self._update_in_backward(micro_batches, tokens, rate, selected)
        loss, accuracy = self._forward(micro_batches, tokens, None)
        return loss, accuracy, self._update_after_backward(rate, selected)

    def _forward(
        self, micro_batches: list[dict[str, Tensor]], tokens: int, forward_only_seed: int | None
    ) -> tuple[float, float]:
        """Loss and token accuracy over all processes' micro-batches; gradients of one's own too, unless only forward.

        Only forward: with that RNG seed. NotFinite if the loss is not.
        """
        one_pass = self.model.mebp.loss
        loss, correct = 0.0, 0
        one_pass.normalizer = tokens
        context = contextlib.nullcontext() if forward_only_seed is None else torch.no_grad()
        try:
            with context:
                if forward_only_seed is not None:
                    torch.manual_seed(self.processes.seed(forward_only_seed))
                random_state = self._random_state()
                for batch in micro_batches:
                    output = self.model(**batch, use_cache=False)
                    if self.config.optimizer_in_backward:
                        self._check_loss(output.loss.item(), micro_batches, random_state)
                    if forward_only_seed is None and output.loss.requires_grad:
                        output.loss.backward()
                    loss += output.loss.item()
                    correct += one_pass.statistics.correct
                    del output  # and what waits for its backward pass, before the next one's is kept
        finally:
            one_pass.normalizer = None
        loss, total = self.processes.sum(loss, correct)
        self._check_loss(loss, micro_batches, random_state)
        return loss, total / tokens

    def _update_after_backward(self, rate: float, selected: list[int]) -> float:
        assert self.optimizer is not None
        groups, trained = self.optimizer.param_groups, frozenset(selected) | self._outside()
        self.reduced_bytes = self.processes.sum_gradients([groups[index]["params"] for index in sorted(trained)])
        limit = self.config.max_grad_norm or math.inf
        total = total_norm(self.parameters)
        norm = float(total)
        self._check_gradients(norm)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, total)
        if self.selection.schedule == "importance":
            clipped = max(1.0, norm / limit)
            norms = {index: clipped * gradient_norm(groups[index]["params"]) for index in selected}
            self.selection.record_norms(norms)
        self._set_rate(rate)
        self.optimizer.step(selected=trained)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _update_in_backward(
        self, micro_batches: list[dict[str, Tensor]], tokens: int, rate: float, selected: list[int]
    ) -> tuple[float, float, float]:
        """Loss, token accuracy and the norm of all gradients, which exist block by block and are gone."""
        assert self.optimizer is not None
        self._set_rate(rate)

        def check(index: int, norm: float) -> None:
            self._check_gradients(norm)
            found[index] = norm

        found: dict[int, float] = {}
        limit = self.config.max_grad_norm or math.inf
        with self.optimizer.step_in_backward(frozenset(selected) | self._outside(), limit, check) as norms:
            loss, accuracy = self._forward(micro_batches, tokens, None)
        self.optimizer.zero_grad(set_to_none=True)
        if self.selection.schedule == "importance":
            self.selection.record_norms({index: found[index] for index in selected if index in found})
        return loss, accuracy, math.hypot(*norms)

    def _set_rate(self, rate: float) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _outside(self) -> frozenset[int]:
        """Groups beyond the blocks: always trained."""
        assert self.optimizer is not None
        return frozenset(range(self.selection.count, len(self.optimizer.param_groups)))

    def _check_loss(self, loss: float, micro_batches: list[dict[str, Tensor]], random_state: dict[str, Tensor]) -> None:
        """``random_state``: that before the micro-batches were run, which draw the same again."""
        if not math.isfinite(loss):
            self._set_random_state(random_state)
            broken = broken_parameter(self.model) or broken_output(self.model, micro_batches)
            raise NotFinite(f"loss is {loss} at step {self.step}, first {broken or self._elsewhere('the loss itself')}")

    def _check_gradients(self, norm: float) -> None:
        if not math.isfinite(norm):
            broken = broken_gradient(self.model)  # None where each is finite, and their squares' sum is not
            raise NotFinite(f"gradient norm is {norm} at step {self.step}, first {broken or 'in the sum of squares'}")

    def _elsewhere(self, what: str) -> str:
        return f"in {what}" if self.processes.size == 1 else f"in {what}, or in another process"

    def _keep_state_before_step(self, random_state: dict[str, Tensor]) -> str:
        """Writes it as a checkpoint, where nothing of it has changed; where what is kept lies."""
        changed = self.mezo is not None or self.config.optimizer_in_backward
        broken = self.processes.highest(broken_parameter(self.model) is not None)
        if self.step == 0 or changed or any(broken):
            return self._kept()
        self._set_random_state(random_state)
        self.save_checkpoint()
        return f"the state before this step is in {self.run.checkpoint}"

    def _kept(self) -> str:
        return "the last checkpoint is kept" if self.run.checkpoint.exists() else "no checkpoint was written yet"

    def _optimizer_files(self) -> list[str]:
        """The files of a checkpoint that hold the optimizer's state, a group each."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [f"optimizer-{index:05d}.safetensors" for index in range(len(groups))]

    def save_checkpoint(self) -> None:
        """Adapter, optimizer, random state and position in ``checkpoint/``; the adapter alone in ``adapter/``.

        RunError where the adapter is not finite, or the processes' are not the same bits; the last checkpoint stays.
        """
        if (broken := broken_parameter(self.model)) is not None:
            raise NotFinite(f"{broken} is not finite after step {self.step}: {self._kept()}")
        tensors = {f"adapter/{name}": tensor.cpu().contiguous() for name, tensor in adapter_tensors(self.model).items()}
        self._check_drift(tensors)
        tensors |= self._random_states()
        if not self.processes.is_first:
            return
        state = {
            "step": self.step,
            "processes": self.processes.size,
            "fingerprints": self.fingerprints,
            "config": asdict(self.config),
            "selection": self.selection.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "first_step": self.first_step,
        }

        def write(directory: Path) -> None:
            safetensors_file.write_safetensors(directory / STATE, tensors)
            for index, name in enumerate(self._optimizer_files()):  # one by one, so that no two are in memory
                assert self.optimizer is not None
                safetensors_file.write_safetensors(directory / name, self.optimizer.export_group(index, copy=False))
                self.optimizer.moments.drop(index)
            crc32 = {name: reading.file_checksums(directory / name) for name in (STATE, *self._optimizer_files())}
            strict_json.write_json(directory / "state.json", strict_json.sealed(state | {"crc32": crc32}))

        self.run.sync_metrics()
        atomic.replace_directory(self.run.checkpoint, write)
        save_adapter(self.model, self.run.adapter)

    def _check_drift(self, tensors: dict[str, Tensor]) -> None:
        checksum = 0
        for tensor in tensors.values() if self.processes.size > 1 else ():
            checksum = zlib.crc32(tensor.view(torch.uint8).numpy().data, checksum)
        if not self.processes.same(checksum):
            raise RunError(
                f"the adapters of the processes differ after step {self.step}, and must not: start them on machines of "
                f"one kind, with the same versions; {self._kept()}"
            )

    def _random_state(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_random_state(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def _random_states(self) -> dict[str, Tensor]:
        """Of every process; the first one's without its rank."""
        states = self._random_state()
        return {
            f"random/{kind}-{rank}" if rank else f"random/{kind}": found
            for kind, state in states.items()
            for rank, found in enumerate(self.processes.gather(state))
        }

    def resume(self, checkpoint: Path) -> None:
        """Goes on from ``checkpoint``, to the same numbers as a run that was not interrupted.

        Raises:
            ValueError: it is damaged, or of a run with other settings or another number of processes.
        """
        if checkpoint == self.run.checkpoint:
            self.processes.first(lambda: atomic.finish_replacing(checkpoint))
        if not (checkpoint / "state.json").exists():
            raise ValueError(f"there is no checkpoint in {checkpoint} to resume from")
        state = strict_json.read_sealed(checkpoint / "state.json")
        try:
            for name in (STATE, *self._optimizer_files()):
                if reading.file_checksums(checkpoint / name) != state["crc32"][name]:
                    raise ValueError(f"{checkpoint / name} is damaged: its checksum differs")
            self._check_same(state["config"], state["fingerprints"])
            began = state.get("processes", 1)
            if type(began) is not int or began != self.processes.size:
                raise ValueError(f"cannot resume: the run had {began!r} processes and now has {self.processes.size}")
            self._restore(state, checkpoint)
        except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"{checkpoint / 'state.json'} is malformed, or of another version ({problem})") from None

    def _check_same(self, config: dict[str, Any], fingerprints: dict[str, int]) -> None:
        """ValueError where the checkpoint's settings, data or model are not these."""
        defaults = asdict(TrainConfig().resolved())  # of settings that are newer than the checkpoint
        ours = asdict(self.config)
        for name, value in (defaults | config).items():
            if name not in FREE_ON_RESUME and ours[name] != value:
                raise ValueError(f"cannot resume: {name} was {value!r:.200} and now is {ours[name]!r:.200}")
        for what, value in self.fingerprints.items():
            if fingerprints[what] != value:
                raise ValueError(f"cannot resume: the {what} changed since the checkpoint was written")

    def _restore(self, state: dict[str, Any], checkpoint: Path) -> None:
        split: dict[str, dict[str, Tensor]] = {"adapter": {}, "random": {}}
        for key, tensor in safetensors_file.read_safetensors(checkpoint / STATE)[0].items():
            room, _, name = key.partition("/")
            split[room][name] = tensor
        step = state["step"]
        if type(step) is not int or not 0 <= step <= self.total_steps:
            raise ValueError(f"{checkpoint / 'state.json'} is malformed: step {step!r:.100} of {self.total_steps}")
        self.selection.load_state_dict(state["selection"])
        copy_adapter(self.model, split["adapter"], str(checkpoint))
        for index, name in enumerate(self._optimizer_files()):
            assert self.optimizer is not None
            self.optimizer.import_group(index, safetensors_file.read_safetensors(checkpoint / name)[0])
            self.optimizer.moments.drop(index)
        mine = f"-{self.processes.rank}" if self.processes.rank else ""
        saved = split["random"]
        self._set_random_state({kind: saved[f"{kind}{mine}"] for kind in ("cpu", "cuda") if f"{kind}{mine}" in saved})
        self.step, self.skipped_in_a_row = step, int(state["skipped_in_a_row"])
        own = checkpoint.resolve().is_relative_to(self.run.directory.resolve())
        self.first_step = int(state["first_step"]) if own else step
        steps = self.run.cut_metrics(step, self.first_step)
        if self.processes.is_first and steps != list(range(self.first_step, step)):
            warnings.warn(f"{self.run.metrics} does not have each step before {step} once", stacklevel=2)
        if self.processes.is_first and not self._adapter_is_written():
            save_adapter(self.model, self.run.adapter)

    def _adapter_is_written(self) -> bool:
        """What ended a run may have done so between the checkpoint and the adapter beside it."""
        ours = adapter_tensors(self.model)
        try:
            saved, _ = safetensors_file.read_safetensors(self.run.adapter / "adapter_model.safetensors")
        except (OSError, errors.FileError):
            return False
        same = saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name].cpu()) for name in saved)
        return same and (self.run.adapter / "adapter_config.json").exists()


def _store_checksum(store: Store) -> int:
    """Of the weights, and of the config, by which the same weights may be another model."""
    checksums = {name: file.crc32 for name, file in store.files.items()}
    checksums["config.json"] = store.companions.get("config.json", [])
    return zlib.crc32(json.dumps(checksums, sort_keys=True).encode())
