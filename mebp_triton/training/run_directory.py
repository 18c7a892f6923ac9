"""The directory of a run: ``run.json``, ``metrics.jsonl``, the adapter, the resumable checkpoint, and plots."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mebp_triton.data.tokenized import DataReport
from mebp_triton.models.adapter import CHAT_TEMPLATE
from mebp_triton.models.adapter_directory import CONFIG
from mebp_triton.models.adapter_seal import WEIGHTS
from mebp_triton.models.generation import GENERATION_CONFIG
from mebp_triton.system import atomic, errors, reading, strict_json, temporaries
from mebp_triton.system.machine import environment
from mebp_triton.system.memory import MemoryWatch, return_free_memory

from .evaluation import Evaluation
from .facts import MOST_INTEGER
from .plots import draw_plots
from .settings import TrainConfig

METRICS_LIMIT = 1 << 34  # bytes of metrics.jsonl that are read
BESIDE_THE_SUMMARY = ("plots", "start", "data", "settings", "environment")  # what run.json holds besides


def is_evaluation(row: dict[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` is that of an evaluation; its step is the last one taken before it."""
    return "eval_loss" in row


class RunDirectory:
    """The directory that a run writes into.

    Args:
        directory: its path. ``create`` and ``writing`` make the directory; nothing is written before.
        resume: whether it may hold a run already.

    Raises:
        FileError: it holds something, and ``resume`` is false; or it cannot be made.
    """

    def __init__(self, directory: Path | str, resume: bool = False) -> None:
        self.directory = Path(directory)
        (atomic.check_place if resume else atomic.check_absent)(self.directory)
        self.checkpoint = self.directory / "checkpoint"
        self.adapter = self.directory / "adapter"
        self.best = self.directory / "adapter_best"
        self.metrics = self.directory / "metrics.jsonl"
        self.record = self.directory / "run.json"
        self.evaluation = self.directory / "evaluation_before.json"
        self._held = False

    def create(self) -> None:
        """Makes the directory, and removes what a process that was killed left in it half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for place in (self.directory, self.adapter, self.best):
            temporaries.remove_leftovers(place)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While active, no other process writes into the directory. It is made, and removed again if it stays empty.

        Raises:
            FileError: another process is writing into it.
        """
        if self._held:  # the command takes the lock for the whole run, and the trainer within it
            yield
            return
        made = atomic.missing_directories(self.directory)
        self.create()
        with atomic.locked(self.directory), atomic.removed_if_empty(made):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def is_before_checkpoint(self) -> bool:
        """Whether the directory holds nothing but what a run writes before its first checkpoint."""
        names = {entry.name for entry in self.directory.iterdir()}
        names -= {self.metrics.name, self.evaluation.name, self.best.name, GENERATION_CONFIG}
        names.discard("runs")  # what TensorBoard writes
        if self.adapter.is_dir() and {entry.name for entry in self.adapter.iterdir()} <= {CHAT_TEMPLATE}:
            names.discard(self.adapter.name)
        return all(name.startswith(temporaries.TEMPORARY_PREFIX) for name in names)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Appends the line of a step, or of an evaluation. ValueError where it has a number that is not finite."""
        atomic.append_line(self.metrics, json.dumps(row, allow_nan=False))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of all steps; none if there is no file. FileError where a line is damaged."""
        if not self.metrics.exists():
            return []
        return [row for _, row in self._metrics() if not is_evaluation(row)]

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Returns the lines of all evaluations during the training. FileError where a line is damaged."""
        if not self.metrics.exists():
            return []
        return [row for _, row in self._metrics() if is_evaluation(row)]

    def _metrics(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields every line and its values. A last line that was cut short is left out.

        Raises:
            FileError: another line is damaged.
        """
        *whole, cut = reading.read_bytes(self.metrics, METRICS_LIMIT).split(b"\n")
        for number, line in enumerate(whole, start=1):
            if not line.strip():
                continue
            row = strict_json.parse_json(line, f"line {number} of {self.metrics}")
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise errors.FileError(f"line {number} of {self.metrics} is damaged: it has no step; remove the line")
            yield line.decode(), row

    def cut_metrics(self, step: int, first: int = 0, evaluated_at: int = MOST_INTEGER) -> list[int]:
        """Drops the lines of steps from ``step`` on, which will be taken again, and a last line that was cut short.

        Args:
            step: the first step to drop.
            first: the first step that has a line here.
            evaluated_at: evaluations after more steps than these are dropped as well.

        Returns:
            The steps that are left.

        Raises:
            FileError: a line of an earlier step is damaged.
        """
        if not self.metrics.exists():
            return []
        kept: list[str] = []
        steps: list[int] = []
        try:
            for line, row in self._metrics():
                if is_evaluation(row):
                    if row["step"] < min(step, evaluated_at):
                        kept.append(f"{line}\n")
                elif row["step"] < step:
                    kept.append(f"{line}\n")
                    steps.append(row["step"])
        except errors.FileError:
            # Once every step before has its line, a damaged one can only be of a step that is dropped.
            if len(steps) < step - first:
                raise
        data = "".join(kept).encode()
        if data != self.metrics.read_bytes():
            atomic.write_bytes(self.metrics, data)
        return steps

    def complete_best(self) -> None:
        """Copies what ``adapter/`` has besides weights and config into ``adapter_best/``: a chat template, say."""
        own = {CONFIG, WEIGHTS}
        for entry in self.adapter.iterdir() if self.adapter.is_dir() else ():
            if entry.is_file() and entry.name not in own and not entry.name.startswith(temporaries.TEMPORARY_PREFIX):
                atomic.write_bytes(self.best / entry.name, entry.read_bytes())

    def sync_metrics(self) -> None:
        """Brings the metrics to the disk, so that they outlast a loss of power as a checkpoint does."""
        if self.metrics.exists():
            atomic.sync_file(self.metrics)

    def save_evaluation(self, evaluation: Evaluation | None, of: dict[str, Any]) -> None:
        """Keeps the evaluation from before the training, for a run that is resumed.

        Args:
            evaluation: nothing is kept for None.
            of: the settings that say what was evaluated.
        """
        if evaluation is not None:
            strict_json.write_json(self.evaluation, strict_json.sealed({"of": of, "found": asdict(evaluation)}))

    def saved_evaluation(self, of: dict[str, Any]) -> Evaluation | None:
        """Returns what ``save_evaluation`` kept; None if there is nothing, or if something else was evaluated.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.evaluation.exists():
            if of.get("validation_file"):
                warnings.warn(f"{self.evaluation} is gone: the loss before training is not known", stacklevel=2)
            return None
        saved = strict_json.read_sealed(self.evaluation)
        try:
            return Evaluation(**saved["found"]) if saved["of"] == of else None
        except (TypeError, KeyError):
            raise ValueError(f"{self.evaluation} is malformed: remove it to go on without") from None

    def reopen(self) -> None:
        """Removes ``run.json`` of a run that ended and now goes on, since it would no longer be true."""
        self.record.unlink(missing_ok=True)

    def finish(
        self,
        summary: dict[str, Any],
        config: TrainConfig,
        data: DataReport,
        watch: MemoryWatch,
        start: dict[str, Any] | None = None,
    ) -> None:
        """Writes ``run.json`` and, if matplotlib is installed, the plots.

        Args:
            start: the adapter that the run began from; None for a new one.
        """
        # The library that draws takes some 20 MiB, which would come on top of what malloc kept of the steps.
        return_free_memory()
        try:
            plots = draw_plots(self.directory, self.read_metrics(), watch, self.read_evaluations())
        except Exception as error:  # whatever a plotting library raises, the run is whole without plots
            warnings.warn(f"the plots are not drawn: {' '.join(str(error).split())}", stacklevel=2)
            plots = []
        record = {
            **summary,
            "plots": plots,
            "start": start,
            "data": asdict(data),
            "settings": asdict(config),
            "environment": environment(watch.device),
        }
        strict_json.write_json(self.record, strict_json.sealed(record))

    def summary(self, of: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the summary that ``finish`` has written here, or None if no run has ended here.

        Raises:
            ValueError: that run evaluated something else than ``of``, or the file is damaged.
        """
        if not self.record.exists():
            return None
        record = strict_json.read_sealed(self.record)
        for name, value in of.items():
            if (before := record["settings"].get(name)) != value:
                raise ValueError(
                    f"the run in {self.directory} has ended, evaluated with {name} {before!r:.100}: "
                    f"for {value!r:.100}, use `mebp eval`"
                )
        return {name: value for name, value in record.items() if name not in BESIDE_THE_SUMMARY}


def run_of(adapter: Path) -> RunDirectory | None:
    """The directory of the run whose last or best adapter ``adapter`` is by its name; None for another name."""
    run = RunDirectory(adapter.resolve().parent, resume=True)
    return run if adapter.resolve() in (run.adapter, run.best) else None


def run_settings_beside(adapter: Path) -> TrainConfig | None:
    """The settings of the run that wrote ``adapter``; None where it does not lie in the directory of a run.

    Raises:
        ValueError: the run's record is damaged.
    """
    run = run_of(adapter)
    if run is None:
        return None
    for path, key in ((run.record, "settings"), (run.checkpoint / "state.json", "config")):
        if path.exists():
            found = strict_json.read_sealed(path).get(key)
            if not isinstance(found, dict):
                raise errors.FileError(f"{path} is damaged: it has no {key}")
            names = {field.name for field in fields(TrainConfig)}
            return TrainConfig(**{name: value for name, value in found.items() if name in names})
    return None


class OthersRunDirectory(RunDirectory):
    """The run directory as seen by all processes but the first, which alone writes: they only read."""

    def __init__(self, directory: Path | str, resume: bool = True) -> None:
        super().__init__(directory, resume=True)

    def create(self) -> None:
        pass

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def append_metrics(self, row: dict[str, Any]) -> None:
        pass

    def cut_metrics(self, step: int, first: int = 0, evaluated_at: int = MOST_INTEGER) -> list[int]:
        return []

    def save_evaluation(self, evaluation: Evaluation | None, of: dict[str, Any]) -> None:
        pass

    def reopen(self) -> None:
        pass

    def finish(self, *record: Any, **start: Any) -> None:
        pass
