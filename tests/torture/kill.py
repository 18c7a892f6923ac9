"""Kills commands anywhere, lets them go on, and compares what they end with to what an uninterrupted command ends with.

    python tests/torture/kill.py --output bench/results/torture/kill.json

Quantizing, several kinds of training, quantizing and training, merging and tuning are tried on a tiny model, on the
CPU. A point is one SIGKILL, of three kinds:

    operation   before the n-th file operation: a file opened for writing, renamed, removed, made, ...
    half        in the middle of the n-th write of a file, of which a half is there
    moment      at a random moment: after an own process began to write, or in the middle of going on, too

After each kill the files that are there are checked: a store, checkpoint, adapter or table is whole, or is not taken
for one. Then the same command runs again (`mebp train` with `--resume`). It must end with the same files, byte for
byte: adapter, optimizer state, random state, metrics and results, except for times, peaks of memory and plots.
Nothing else may be left.

Commands run in forks of this process, which has imported everything and computed nothing: that takes a second, not
ten. Tuning takes made-up times in place of compiled kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import Ended, command, forked, rank_without_compiling, remove_nothing
from results import finish
from world import scratch_and_world

# Paths are relative: those in a run's settings are the same wherever the scratch directory lies.
STORE, ADAPTER = "../../world/store", "--adapter=../../world/adapter"
TRAIN = ["--train-file=../../world/data/train.txt", "--validation-file=../../world/data/valid.txt", "--output-dir=run"]
TRAIN += ["--max-length=24", "--lora-r=2", "--learning-rate=0.01", "--device=cpu", "--save-steps=2"]
SELECTED = ["--selection-mode=identity", "--selection-schedule=random", "--selected-ratio=0.34"]
SELECTED += ["--unselected-update=momentum", "--lora-dropout=0.2", "--gradient-accumulation-steps=2"]
SELECTED += ["--per-device-train-batch-size=2", "--warmup-steps=2", "--lr-scheduler-type=cosine", "--weight-decay=0.05"]
IN_BACKWARD = ["--selection-mode=exact", "--selection-schedule=importance", "--selected-ratio=0.67"]
IN_BACKWARD += ["--optimizer-in-backward", "--lora-dropout=0.1"]
TWO_EPOCHS = ["--num-train-epochs=2", "--per-device-train-batch-size=4", "--optimizer-state=host"]
WITH_PLOTS = "train, two epochs, state in host memory"
COMMANDS = {
    "quantize": ["quantize", "../../world/model", "store", "--group-size=32"],
    "train, blocks selected, momentum, dropout, accumulation": ["train", STORE, *TRAIN, "--max-steps=6", *SELECTED],
    "train, optimizer in backward, importance": ["train", STORE, *TRAIN, "--max-steps=5", *IN_BACKWARD],
    WITH_PLOTS: ["train", STORE, *TRAIN, *TWO_EPOCHS],
    "train, mezo": ["train", STORE, *TRAIN, "--max-steps=5", "--optim=mezo", "--lora-dropout=0.1"],
    "quantize, then train": ["train", "../../world/model", *TRAIN, "--max-steps=3", "--group-size=32"],
    "merge into a model": ["merge", STORE, "merged", ADAPTER, "--dtype=float32"],
    "merge into a store": ["merge", STORE, "merged", ADAPTER, "--as-store"],
    "tune": ["tune", "--offline", "--target=sm_87", "--shapes=256x128,512x128,512x512", "--m=16,64"]
    + ["--output=table.json"],
}
CHANGING = ("seconds", "seconds_waiting_for_data", "peak_rss_bytes")  # columns of metrics.jsonl
RESULTS = ("loss_before", "loss_after", "token_accuracy_before", "token_accuracy_after", "perplexity_after", "steps")
RESULTS += ("train_loss_last", "trainable_parameters", "settings", "data", "backend")  # of run.json
COUNTED = ("points", "operation", "half", "moment", "own process", "before it began", "ended before")
PATH_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DEADLINE = 300  # seconds


@dataclass
class Run:
    """How a command ended, and the numbers of file operations and of writes that it began."""

    ended: Ended
    operations: int = 0
    writes: int = 0

    @property
    def killed(self) -> bool:
        return self.ended.signal in ("SIGKILL", "hang")  # by itself, or by us after some seconds

    @property
    def said(self) -> str:
        return self.ended.out + self.ended.err


class Killer:
    """Counts, in a child, the file operations below the working directory, and kills the process at one of them.

    Args:
        counts: shared with the parent: operations, writes.
        kind: "operation" or "half"; anything else kills nowhere.
        at: the number of the operation or write, from 1.
    """

    def __init__(self, counts: memoryview, kind: str, at: int) -> None:
        from mebp_triton.system import atomic, safetensors_file

        self.counts, self.kind, self.at = counts, kind, at
        self.root = os.getcwd()
        sys.addaudithook(self._on_event)
        for owner, name, write_half in (
            (Path, "write_bytes", self._half_of_bytes),
            (atomic, "append_line", self._half_of_line),
            (safetensors_file, "write_safetensors_pieces", self._half_of_pieces),
        ):
            setattr(owner, name, self._counting_writes(getattr(owner, name), write_half))

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in PATH_EVENTS:
            name = arguments[0]
        else:
            return
        if isinstance(name, str | bytes | os.PathLike):
            path = os.fsdecode(name)
            if not os.path.isabs(path) or path.startswith(self.root):
                self._count(0, "operation")

    def _count(self, place: int, kind: str, before: Callable[[], object] = lambda: None) -> None:
        self.counts[place] += 1
        if kind == self.kind and self.counts[place] == self.at:
            self.kind = ""
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def _counting_writes(self, write: Callable[..., Any], write_half: Callable[..., None]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            self._count(1, "half", lambda: write_half(write, *arguments, **more))
            return write(*arguments, **more)

        return counted

    @staticmethod
    def _half_of_bytes(write: Any, path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])

    @staticmethod
    def _half_of_line(write: Any, path: Path, line: str) -> None:
        with open(path, "a") as file:
            file.write(line[: len(line) // 2])

    @staticmethod
    def _half_of_pieces(write: Any, path: Path, entries: Any, pieces: Any, *metadata: Any) -> None:
        def some() -> Iterator[Any]:
            for index, piece in enumerate(pieces):
                if 2 * index > len(entries):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield piece

        write(path, entries, some(), *metadata)


def run(
    directory: Path, arguments: list[str], kind: str = "", at: float = 0, plots: bool = False, planted: bool = False
) -> Run:
    """Runs ``mebp`` in ``directory``; kills it at the ``at``-th operation or write, or after ``at`` seconds."""
    with mmap.mmap(-1, 16) as shared, memoryview(shared) as raw, raw.cast("Q") as counts:

        def work() -> int:
            os.chdir(directory)
            rank_without_compiling()
            if plots:
                draw_plots_again()
            if planted:
                remove_nothing()
            Killer(counts, kind, int(at))
            return command(arguments)()

        ended = forked(work, seconds=at if kind == "moment" else DEADLINE)
        return Run(ended, counts[0], counts[1])


def draw_plots_again() -> None:
    from mebp_triton.training import plots, run_directory

    run_directory.draw_plots = plots.draw_plots


TUNE_PROCESS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import forked
from mebp_triton.cli.main import main
forked.rank_without_compiling()
sys.exit(main(sys.argv[1:]))
"""


def run_own_process(directory: Path, arguments: list[str], seconds: float) -> Run:
    """Runs ``mebp`` as a shell starts it; kills it ``seconds`` after the first entry appears in ``directory``."""
    program = ["-c", TUNE_PROCESS] if arguments[0] == "tune" else ["-m", "mebp_triton.cli"]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen([sys.executable, *program, *arguments], cwd=directory, stdout=said, stderr=said)
        while child.poll() is None and not began(directory):
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        child.kill()
        code = child.wait()
        said.seek(0)
        by = signal.Signals(-code).name if code < 0 else ""
        return Run(Ended(None if by else code, by, "", said.read(), 0, time.perf_counter() - started))


def began(directory: Path) -> bool:
    return any(directory.iterdir())


# --- what is compared -----------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, Any]:
    """The bytes of every file by its relative path, without the values that differ between two runs of one command."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key not in CHANGING} for row in rows]
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            found[name] = {key: record[key] for key in RESULTS}
        elif path.suffix != ".png":
            found[name] = path.read_bytes()
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    lacking, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    return (
        [f"lacks {name}" for name in lacking]
        + [f"left {name}" for name in surplus]
        + [f"differs: {name}" for name in other]
    )


def half_written(directory: Path, wanted: dict[str, Any]) -> list[str]:
    """Lists what a kill left half-written and a reader would take for whole."""
    from mebp_triton.kernels.tables import read_named_table
    from mebp_triton.models.adapter_seal import read_adapter_tensors
    from mebp_triton.store.reader import Store
    from mebp_triton.system import atomic, reading

    wrong = []
    for name in ("store", "merged", "run-store"):
        place = directory / name
        if not place.is_dir() or not any(place.iterdir()):
            continue
        try:
            if (place / "manifest.json").exists():
                for file in Store(place).files.values():
                    file.verify()
        except ValueError as error:
            wrong.append(str(error))
        inside = {path: value for path, value in wanted.items() if path.startswith(name + "/")}
        here = {path: value for path, value in contents(directory).items() if path.startswith(name + "/")}
        wrong += differences(here, inside)
    run, table = directory / "run", directory / "table.json"
    checkpoint = atomic.locate_directory(run / "checkpoint")
    if checkpoint.exists():
        state = json.loads((checkpoint / "state.json").read_text())
        wrong += [file for file, sums in state["crc32"].items() if reading.file_checksums(checkpoint / file) != sums]
    if (run / "adapter" / "adapter_config.json").exists():
        read_adapter_tensors(run / "adapter")
    if table.exists():
        read_named_table(table, "sm_87")
    return wrong


# --- points ---------------------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """A command, how it ends when nobody disturbs it, and what the points have found.

    Attributes:
        wanted: the ``contents`` that it ends with.
        whole: the undisturbed run.
    """

    name: str
    arguments: list[str]
    wanted: dict[str, Any]
    whole: Run
    planted: bool
    counted: Counter[str] = field(default_factory=Counter)
    lost: list[dict[str, Any]] = field(default_factory=list)

    def run(self, place: Path, arguments: list[str], kind: str = "", at: float = 0) -> Run:
        return run(place, arguments, kind, at, self.name == WITH_PLOTS, self.planted)


def undisturbed(root: Path, name: str, planted: bool) -> Scenario:
    scenario = Scenario(name, COMMANDS[name], {}, Run(Ended(0, "", "", "", 0, 0.0)), planted)
    place = new_place(root, "whole")
    scenario.whole = scenario.run(place, scenario.arguments)
    if scenario.whole.ended.code != 0:
        raise SystemExit(f"{name}: {scenario.whole.said}")
    scenario.wanted = contents(place)
    return scenario


def check_repeats(root: Path, scenario: Scenario) -> None:
    """SystemExit if the undisturbed command ends with other bytes the second time: then no point says anything."""
    place = new_place(root, "again")
    scenario.run(place, scenario.arguments)
    if problems := differences(contents(place), scenario.wanted):
        raise SystemExit(f"{scenario.name} ends with other bytes the second time: {problems}")


def new_place(root: Path, name: str) -> Path:
    place = root / "runs" / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def going_on(place: Path, arguments: list[str]) -> list[str]:
    """The command that goes on. A training that was killed before it had made its directory is no run yet."""
    return [*arguments, "--resume"] if arguments[0] == "train" and (place / "run").exists() else arguments


def complete(place: Path, arguments: list[str]) -> bool:
    """Whether nothing is left to do: `quantize` and `merge` refuse to do it again."""
    return arguments[0] in ("quantize", "merge") and any((place / arguments[2]).glob("*"))


def try_point(
    root: Path, scenario: Scenario, kind: str, at: float, own: bool, again: float | None
) -> tuple[str, int, list[str]]:
    """Kills the command once or twice and lets it go on.

    A moment at which the command had ended already, or had written nothing yet, is no point.

    Args:
        own: the command runs in a process of its own.
        again: the command that goes on is killed as well, after so many seconds, and another one goes on.

    Returns:
        The kind of the first kill, the number of points that the two kills are, and what went wrong, in words.
    """
    place, arguments = new_place(root, "point"), scenario.arguments
    first = run_own_process(place, arguments, at) if own else scenario.run(place, arguments, kind, at)
    if first.ended.code == 0 and kind == "moment":
        return "ended before", 0, []
    if not first.killed:
        return kind, 1, [f"was to be killed, and ended with {first.ended.code}: {first.said[-300:]}"]
    if kind == "moment" and not began(place):
        kind = "before it began"
    kills = int(kind != "before it began")
    problems = half_written(place, scenario.wanted)
    if again is not None and not complete(place, arguments):
        kills += scenario.run(place, going_on(place, arguments), "moment", again).killed
        problems += half_written(place, scenario.wanted)
    if not complete(place, arguments):
        last = scenario.run(place, going_on(place, arguments))
        if last.ended.code != 0:
            return kind, kills, [*problems, f"does not go on: {last.said.strip()[-300:]}"]
    return kind, kills, problems + differences(contents(place), scenario.wanted)


def points(
    scenario: Scenario, count: int, moments: int, draw: random.Random
) -> Iterator[tuple[str, float, bool, float | None]]:
    """Yields ``try_point``'s kind, at, own and again for ``count`` exact points and ``moments`` random ones."""
    halves = min(max(count // 3, 1), count - 1, scenario.whole.writes)
    for kind, total, wanted in (
        ("operation", scenario.whole.operations, count - halves),
        ("half", scenario.whole.writes, halves),
    ):
        for index in range(min(wanted, total)):  # one in each stretch of as many operations
            first, last = 1 + index * total // wanted, (index + 1) * total // wanted
            yield kind, draw.randint(first, max(first, last)), False, None
    for index in range(moments):
        whole = scenario.whole.ended.seconds
        seconds = whole * draw.random()
        again = whole * draw.random() if index % 4 == 1 else None
        yield "moment", seconds, index % 4 == 3, again


def try_scenario(root: Path, scenario: Scenario, count: int, moments: int, seed: int) -> None:
    """Tries all points of a command; counts them, and keeps those that lost something."""
    draw = random.Random(zlib.crc32(f"{seed} {scenario.name}".encode()))
    for kind, at, own, again in points(scenario, count, moments, draw):
        was, kills, wrong = try_point(root, scenario, kind, at, own, again)
        what = {"kind": kind, "at": round(at, 3), "own_process": own, "again_at": again}
        scenario.counted["points"] += kills
        scenario.counted[kind] += kills
        scenario.counted["own process"] += own and was == kind
        if was != kind:
            scenario.counted[was] += 1
        if wrong:
            check_repeats(root, scenario)
            scenario.lost.append(what | {"wrong": wrong})
            print(f"{scenario.name}: {what}: {wrong}", file=sys.stderr, flush=True)
    counted = f"{scenario.counted['points']} points, {len(scenario.lost)} lost"
    print(f"{scenario.name}: {counted}", file=sys.stderr, flush=True)


def summary(scenarios: list[Scenario]) -> dict[str, Any]:
    tried, lost = sum(one.counted["points"] for one in scenarios), sum(len(one.lost) for one in scenarios)
    return {
        "tried": tried,
        "survived": tried - lost,
        "lost": lost,
        "commands": {
            one.name: {
                "arguments": one.arguments,
                "file_operations": one.whole.operations,
                "writes": one.whole.writes,
                **{kind: one.counted[kind] for kind in COUNTED},
                "lost": one.lost,
            }
            for one in scenarios
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10, help="exact points of each command (default: 10)")
    parser.add_argument("--moments", type=int, default=4, help="random moments of each command (default: 4)")
    parser.add_argument("--only", action="append", default=[], help="commands whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--world", type=Path, help="made by world.py; by default a new one")
    parser.add_argument("--planted", action="store_true", help="commands remove no file: points must be lost")
    parser.add_argument("--output", type=Path, help="where the summary goes as JSON")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    started, scenarios = time.perf_counter(), []
    with scratch_and_world("kill", chosen.world) as (root, world):
        (root / "runs").mkdir()
        if chosen.world:
            (root / "world").symlink_to(world, target_is_directory=True)
        for name in COMMANDS:
            if not chosen.only or any(part in name for part in chosen.only):
                scenarios.append(undisturbed(root, name, chosen.planted))
                try_scenario(root, scenarios[-1], chosen.points, chosen.moments, chosen.seed)
    seconds = round(time.perf_counter() - started)
    return finish({"seed": chosen.seed, "seconds": seconds, **summary(scenarios)}, chosen.output)


if __name__ == "__main__":
    sys.exit(main())
