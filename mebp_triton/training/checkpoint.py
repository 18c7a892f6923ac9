"""The checkpoint of a run: everything that a resumed run needs to go on to the same numbers.

A directory holds ``state.json`` (position, settings, selection, checksums), ``state.safetensors`` (the adapter, and the
random states of all processes), and a file for each group of optimizer state. It is replaced as a whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.blocks.selection import LayerCyclicManager
from mebp_triton.models.adapter import PREFIX, adapter_tensors, copy_adapter, save_adapter
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, reading, safetensors_file, strict_json
from mebp_triton.system.errors import FileError, NotFinite, RunError
from mebp_triton.system.random_state import RandomState

from .course import LENGTHS, Course
from .nonfinite import broken_parameter
from .processes import Processes
from .run_directory import RunDirectory
from .run_settings import RunSettings, resolve
from .settings import FREE_ON_RESUME, TrainConfig
from .standing import Standing
from .updates import Update

TENSORS = "state.safetensors"
STATE = "state.json"
BEST = "best"  # a copy of ``adapter_best/``, if there is one


@dataclass
class Position:
    """The place that a run has reached.

    Attributes:
        step: optimizer steps taken.
        first_step: the first step with a line in ``metrics.jsonl``; not 0 if the run began from another's checkpoint.
        skipped_in_a_row: how many steps before this one were skipped, since something in them was not finite.
        start: the adapter that the run began from, as ``run.json`` names it; None where it began from a new one.
        standing: what the evaluations during the training have shown so far.
        began: when the run began, in ISO's form, where its chat template writes the date; else None.
    """

    step: int = 0
    first_step: int = 0
    skipped_in_a_row: int = 0
    start: dict[str, Any] | None = None
    standing: Standing = field(default_factory=Standing)
    began: str | None = None


class Checkpoint:
    """Writes and reads the checkpoint of a run.

    Args:
        model: a model with an adapter. update, selection, settings, run, processes: those of the run.
        fingerprints: checksums of the data and of the model, which a resumed run must share.
    """

    def __init__(
        self,
        model: Any,
        update: Update,
        selection: LayerCyclicManager,
        settings: RunSettings,
        run: RunDirectory,
        processes: Processes,
        fingerprints: dict[str, int],
    ) -> None:
        self.model, self.update, self.selection, self.settings = model, update, selection, settings
        self.run, self.processes, self.fingerprints = run, processes, fingerprints
        self.device: torch.device = model.mebp.device
        self.state_files = [f"optimizer-{index:05d}.safetensors" for index in range(update.state_groups)]

    def kept(self) -> str:
        """Says which checkpoint an error leaves behind."""
        return "the last checkpoint is kept" if self.run.checkpoint.exists() else "no checkpoint was written yet"

    def save(self, position: Position) -> None:
        """Writes ``checkpoint/``, and then the adapter alone into ``adapter/``. After an error, the last one is kept.

        Raises:
            NotFinite: the adapter is not finite.
            RunError: the adapters of the processes are not the same bits.
        """
        if (broken := broken_parameter(self.model)) is not None:
            raise NotFinite(f"{broken} is not finite after step {position.step}: {self.kept()}")
        tensors = {f"adapter/{name}": tensor.cpu().contiguous() for name, tensor in adapter_tensors(self.model).items()}
        self._check_drift(tensors, position.step)
        tensors |= self._random_states()
        if not self.processes.is_first:
            return
        position.standing.kept &= self.run.best.is_dir()  # somebody may have moved it away
        state = {
            "step": position.step,
            "processes": self.processes.size,
            "fingerprints": self.fingerprints,
            "config": asdict(self.settings),
            "selection": self.selection.state_dict(),
            "skipped_in_a_row": position.skipped_in_a_row,
            "first_step": position.first_step,
            "start": position.start,
            "standing": asdict(position.standing),
            "began": position.began,
        }

        def write(directory: Path) -> None:
            safetensors_file.write_safetensors(directory / TENSORS, tensors)
            for index, name in enumerate(self.state_files):  # one by one, so that no two are in memory
                safetensors_file.write_safetensors(directory / name, self.update.export_group(index))
                self.update.release_group(index)
            files = [TENSORS, *self.state_files]
            if position.standing.kept:
                shutil.copytree(self.run.best, directory / BEST)
                files += [f"{BEST}/{entry.name}" for entry in (directory / BEST).iterdir()]
            crc32 = {name: reading.file_checksums(directory / name) for name in files}
            strict_json.write_json(directory / STATE, strict_json.sealed(state | {"crc32": crc32}))

        # The metrics reach the disk first: a resumed run expects a line of every step before its checkpoint.
        self.run.sync_metrics()
        atomic.replace_directory(self.run.checkpoint, write)
        save_adapter(self.model, self.run.adapter)

    def _check_drift(self, tensors: dict[str, Tensor], step: int) -> None:
        """Raises RunError where the processes' adapters are not the same bits: they would go on apart for good."""
        checksum = 0
        for tensor in tensors.values() if self.processes.size > 1 else ():
            checksum = zlib.crc32(tensor.view(torch.uint8).numpy().data, checksum)
        if not self.processes.same(checksum):
            raise RunError(
                f"the adapters of the processes differ after step {step}, and must not: start them on machines of "
                f"one kind, with the same versions; {self.kept()}"
            )

    def _random_states(self) -> dict[str, Tensor]:
        """Random states of all processes: "random/cpu" for rank 0, "random/cpu-1" for rank 1."""
        return {
            f"random/{generator}-{rank}" if rank else f"random/{generator}": state
            for generator, own in RandomState(self.device).states.items()
            for rank, state in enumerate(self.processes.gather(own))
        }

    def keep_before_step(self, position: Position, random_state: RandomState) -> str:
        """Writes the state before a step that failed, unless the step has changed it. Says what is kept.

        Args:
            position: of the run before the step.
            random_state: the random state before the step.
        """
        broken = any(self.processes.highest(broken_parameter(self.model) is not None))
        if position.step == 0 or not self.update.undone or broken:
            return self.kept()
        random_state.put_back()
        self.save(position)
        return f"the state before this step is in {self.run.checkpoint}"

    def resume(self, directory: Path, course: Course) -> Position:
        """Puts the run into the state in which ``directory`` was written, and returns its position.

        The run may be longer or shorter than planned then, if that changes none of the steps already taken.

        Raises:
            ValueError: the checkpoint is damaged, or that of a run with other settings or other processes.
        """
        if directory == self.run.checkpoint:
            self.processes.first(lambda: atomic.finish_replacing(directory))
        if not (directory / STATE).exists():
            raise ValueError(f"there is no checkpoint in {directory} to resume from")
        state = strict_json.read_sealed(directory / STATE)
        try:
            standing = Standing(**state.get("standing", {}))
            best = [name for name in state["crc32"] if name.startswith(f"{BEST}/")]
            for name in (TENSORS, *self.state_files, *best):
                if reading.file_checksums(directory / name) != state["crc32"][name]:
                    raise ValueError(f"{directory / name} is damaged: its checksum differs")
            self._check_same(state["config"], state["fingerprints"])
            began = state.get("processes", 1)
            if type(began) is not int or began != self.processes.size:
                raise ValueError(f"cannot resume: the run had {began!r} processes and now has {self.processes.size}")
            self._check_length(state["config"], state["step"], course, directory.parent)
            position = self._restore(state, directory, course.total_steps(self.settings))
            position.standing = standing
        except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"{directory / STATE} is malformed, or of another version ({problem})") from None
        self._settle_run_directory(position, directory)
        return position

    def _check_same(self, settings: dict[str, Any], fingerprints: dict[str, int]) -> None:
        """Raises ValueError where the checkpoint's settings, data or model are not those of this run."""
        # A checkpoint of an older version lacks newer settings. That version did what their defaults do.
        defaults = asdict(resolve(TrainConfig()))
        ours = asdict(self.settings)
        for name, value in (defaults | settings).items():
            if name not in FREE_ON_RESUME and name not in LENGTHS and ours[name] != value:
                raise ValueError(f"cannot resume: {name} was {value!r:.200} and now is {ours[name]!r:.200}")
        for what, checksum in self.fingerprints.items():
            if fingerprints[what] != checksum:
                other = "; or another version made other tokens of it: a new run goes on by --adapter"
                raise ValueError(
                    f"cannot resume: the {what} changed since the checkpoint was written"
                    + (other if what == "training data" else "")
                )

    def _check_length(self, settings: dict[str, Any], step: Any, course: Course, run: Path) -> None:
        """Raises ValueError where the run is longer or shorter than planned, and its first steps would be others."""
        before = replace(self.settings, **{name: settings[name] for name in LENGTHS})
        if type(step) is int:
            course.check_same_steps(before, self.settings, step, run)

    def _restore(self, state: dict[str, Any], directory: Path, total_steps: int) -> Position:
        tensors: dict[str, dict[str, Tensor]] = {"adapter": {}, "random": {}}
        for key, tensor in safetensors_file.read_safetensors(directory / TENSORS)[0].items():
            kind, _, name = key.partition("/")
            tensors[kind][name] = tensor
        step = state["step"]
        if type(step) is not int or not 0 <= step <= total_steps:
            raise ValueError(f"{directory / STATE} is malformed: step {step!r:.100} of {total_steps}")
        self.selection.load_state_dict(state["selection"])
        copy_adapter(self.model, tensors["adapter"], str(directory))
        for index, name in enumerate(self.state_files):
            self.update.import_group(index, safetensors_file.read_safetensors(directory / name)[0])
            self.update.release_group(index)
        suffix = f"-{self.processes.rank}" if self.processes.rank else ""
        saved = tensors["random"]
        # On another device, the saved state of a generator that does not exist here is left out.
        here = RandomState(self.device).states
        own = {name: saved[f"{name}{suffix}"] for name in here if f"{name}{suffix}" in saved}
        RandomState(self.device, own).put_back()
        inside = directory.resolve().is_relative_to(self.run.directory.resolve())
        first_step = int(state["first_step"]) if inside else step
        return Position(step, first_step, int(state["skipped_in_a_row"]), state.get("start"))

    def _settle_run_directory(self, position: Position, directory: Path) -> None:
        """Brings the metrics and the adapters in the run directory to the checkpoint's step."""
        steps = self.run.cut_metrics(position.step, position.first_step, position.standing.evaluated_at)
        if not self.processes.is_first:
            return
        if steps != list(range(position.first_step, position.step)):
            warnings.warn(f"{self.run.metrics} does not have each step before {position.step} once", stacklevel=3)
        if not self._adapter_is_written():
            save_adapter(self.model, self.run.adapter)
        if not position.standing.kept and self.run.best.exists():
            shutil.rmtree(self.run.best)  # of a step that will be taken again
        for kept in (directory / BEST).iterdir() if position.standing.kept else ():
            place = self.run.best / kept.name
            place.parent.mkdir(exist_ok=True)
            if not place.exists() or reading.file_checksums(place) != reading.file_checksums(kept):
                atomic.write_bytes(place, kept.read_bytes())

    def _adapter_is_written(self) -> bool:
        """Whether ``adapter/`` holds this adapter. A run that died between writing its checkpoint and it has none."""
        ours = adapter_tensors(self.model)
        try:
            saved, _ = safetensors_file.read_safetensors(self.run.adapter / "adapter_model.safetensors")
        except (OSError, FileError):
            return False
        same = saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name].cpu()) for name in saved)
        return same and (self.run.adapter / "adapter_config.json").exists()


def store_fingerprint(store: Store) -> int:
    """Returns the CRC-32 over the checksums of the store's weights and its config.json."""
    # The config counts as well: with another one, the same weights are another model.
    checksums = {name: file.crc32 for name, file in store.files.items()}
    checksums["config.json"] = store.companions.get("config.json", [])
    return zlib.crc32(json.dumps(checksums, sort_keys=True).encode())


def adapted_layers(directory: Path) -> frozenset[str] | None:
    """The paths of the layers that have an adapter in a checkpoint; None where it is damaged, which resuming tells."""
    try:
        names, _ = safetensors_file.read_safetensors_header(directory / TENSORS)
    except (OSError, FileError):
        return None
    start, end = f"adapter/{PREFIX}", ".lora_A.weight"
    return frozenset(name[len(start) : -len(end)] for name in names if name.startswith(start) and name.endswith(end))
