"""Kills commands anywhere, lets them go on, and compares what they end with to what an uninterrupted command ends with.

    python tests/torture/kill.py --output bench/results/torture/kill.json

Quantizing, training (several kinds), quantizing and training, merging and tuning, on a tiny model, on the CPU. A point
is one SIGKILL, of three kinds:

    operation   before the n-th file operation: a file opened for writing, renamed, removed, made, ...
    half        in the middle of the n-th write of a file, of which a half is there
    moment      at a random moment; in a process of its own after it began to write, or in the middle of going on, too

After each, what is there is looked at: a store, checkpoint, adapter or table is whole, or is not taken for one. Then
the same command runs again (`mebp train` with `--resume`). It must end with the same files, byte for byte: adapter,
optimizer state, random state, metrics, results; but for times, peaks of memory and plots. Nothing else may be left.

Commands run in forks of this process, which has imported everything and computed nothing: that takes a second, not
ten. Tuning takes made-up predictions in place of what compiling would give.
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
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
from make_store import make_tokenizer

import mebp_triton.cli.training_run
import mebp_triton.convert.merge  # noqa: F401 - imported before the forks
from mebp_triton.autotune import tune
from mebp_triton.autotune.log import Trial
from mebp_triton.cli import main as main_module
from mebp_triton.kernels.tables import read_named_table
from mebp_triton.models.adapter import read_adapter_tensors
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, reading, safetensors_file, strict_json
from mebp_triton.system.machine import environment
from mebp_triton.training import run_directory

CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
}
TRAIN = ["--train-file=../../world/train.txt", "--validation-file=../../world/valid.txt", "--output-dir=run"]
TRAIN += ["--max-length=24", "--lora-r=2", "--learning-rate=0.01", "--device=cpu", "--save-steps=2"]
SELECTED = ["--selection-mode=identity", "--selection-schedule=random", "--selected-ratio=0.34"]
SELECTED += ["--unselected-update=momentum", "--lora-dropout=0.2", "--gradient-accumulation-steps=2"]
SELECTED += ["--per-device-train-batch-size=2", "--warmup-steps=2", "--lr-scheduler-type=cosine", "--weight-decay=0.05"]
IN_BACKWARD = ["--selection-mode=exact", "--selection-schedule=importance", "--selected-ratio=0.67"]
IN_BACKWARD += ["--optimizer-in-backward", "--lora-dropout=0.1"]
STORE, ADAPTER = "../../world/store", "--adapter=../../world/adapter"
TUNE = ["tune", "--offline", "--target=sm_87", "--shapes=256x128,512x128,512x512", "--m=16,64", "--output=table.json"]
COMMANDS = {
    "quantize": ["quantize", "../../world/model", "store", "--group-size=32"],
    "train, blocks selected, momentum, dropout, accumulation": ["train", STORE, *TRAIN, "--max-steps=6", *SELECTED],
    "train, optimizer in backward, importance": ["train", STORE, *TRAIN, "--max-steps=5", *IN_BACKWARD],
    "train, two epochs, state in host memory": [
        "train",
        STORE,
        *TRAIN,
        "--num-train-epochs=2",
        "--optimizer-state=host",
    ],
    "train, mezo": ["train", STORE, *TRAIN, "--max-steps=5", "--optim=mezo", "--lora-dropout=0.1"],
    "quantize, then train": ["train", "../../world/model", *TRAIN, "--max-steps=3", "--group-size=32"],
    "merge into a model": ["merge", STORE, "merged", ADAPTER, "--dtype=float32"],
    "merge into a store": ["merge", STORE, "merged", ADAPTER, "--as-store"],
    "tune": TUNE,
}
CHANGING = ("seconds", "seconds_waiting_for_data", "peak_rss_bytes")  # columns of metrics.jsonl
RESULTS = ("loss_before", "loss_after", "token_accuracy_before", "token_accuracy_after", "perplexity_after", "steps")
RESULTS += ("train_loss_last", "trainable_parameters", "settings", "data", "backend")  # of run.json
COUNTED = ("points", "operation", "half", "moment", "own process", "before it began", "ended before")
PATH_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Ended:
    """A command: its exit code, negative for a signal, how many operations it began, and what it said."""

    code: int
    operations: int
    halves: int
    said: str
    seconds: float


class Deaths:
    """In a child: counts file operations below the working directory, and kills the process at one of them."""

    def __init__(self, counts: memoryview, kind: str, at: int) -> None:
        self.counts, self.kind, self.at = counts, kind, at
        self.root = os.getcwd()
        sys.addaudithook(self._heard)
        Path.write_bytes = self._halved(Path.write_bytes, self._half_bytes)  # type: ignore[method-assign]
        atomic.append_line = self._halved(atomic.append_line, self._half_line)
        safetensors_file.write_safetensors_pieces = self._halved(
            safetensors_file.write_safetensors_pieces, self._half_pieces
        )

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
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

    def _halved(self, write: Callable[..., Any], half: Callable[..., None]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            self._count(1, "half", lambda: half(write, *arguments, **more))
            return write(*arguments, **more)

        return counted

    @staticmethod
    def _half_bytes(write: Any, path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])

    @staticmethod
    def _half_line(write: Any, path: Path, line: str) -> None:
        with open(path, "a") as file:
            file.write(line[: len(line) // 2])

    @staticmethod
    def _half_pieces(write: Any, path: Path, entries: Any, pieces: Any, *metadata: Any) -> None:
        def some() -> Iterator[torch.Tensor]:
            for index, piece in enumerate(pieces):
                if 2 * index > len(entries):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield piece

        write(path, entries, some(), *metadata)


def forked(action: Callable[[], int | None], said: Path, seconds: float | None = None) -> tuple[int, float]:
    """``action`` in a fork of this process, killed after ``seconds``: its exit code, and how long it ran."""
    sys.stdout.flush()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code: int | None = 70
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code or 0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), time.perf_counter() - started


def command(directory: Path, arguments: list[str], kind: str = "", at: float = 0, plots: bool = False) -> Ended:
    """``mebp`` in ``directory``, killed at the ``at``-th operation or half write, or after ``at`` seconds."""
    said = directory.with_name(directory.name + ".txt")
    with mmap.mmap(-1, 16) as shared, memoryview(shared) as raw, raw.cast("Q") as counts:

        def run() -> int:
            os.chdir(directory)
            if not plots:
                run_directory.draw_plots = lambda *_: []  # most of the time of so short a run
            tune.model_rank = made_up_rank
            Deaths(counts, kind, int(at))
            return main_module.main(arguments)

        code, seconds = forked(run, said, at if kind == "moment" else None)
        return Ended(code, counts[0], counts[1], said.read_text(errors="replace"), seconds)


def made_up_rank(architecture: str, limit: int | None = None, progress: Any = None) -> Any:
    def ranked(problem: Any) -> list[Trial]:
        time.sleep(0.02)  # so that a random moment meets it
        return [Trial(None, float(problem.n + problem.m))]

    return ranked


MADE_UP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import kill
kill.tune.model_rank = kill.made_up_rank
sys.exit(kill.main_module.main(sys.argv[1:]))
"""


def own_process(directory: Path, arguments: list[str], seconds: float) -> Ended:
    """``mebp`` as a shell starts it, killed ``seconds`` after the first entry in ``directory``."""
    started = time.perf_counter()
    program = ["-c", MADE_UP] if arguments[0] == "tune" else ["-m", "mebp_triton.cli"]
    with open(directory.with_name(directory.name + ".txt"), "w+") as said:
        child = subprocess.Popen([sys.executable, *program, *arguments], cwd=directory, stdout=said, stderr=said)
        while child.poll() is None and not began(directory):
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        child.kill()
        child.wait()
        said.seek(0)
        return Ended(child.returncode, 0, 0, said.read(), time.perf_counter() - started)


def began(directory: Path) -> bool:
    return any(directory.iterdir())


# --- what is compared -----------------------------------------------------------------------------------------------


def outcome(directory: Path) -> dict[str, Any]:
    """What lies there, by path: all bytes, but what differs from run to run of the same command."""
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


def half_things(directory: Path, wanted: dict[str, Any]) -> list[str]:
    """What a kill left and a reader would take for whole, though it is not."""
    wrong = []
    for name in ("store", "merged", "run-store"):
        place = directory / name
        if not place.is_dir() or not any(place.iterdir()):
            continue
        try:
            if (directory / name / "manifest.json").exists():
                for file in Store(place).files.values():
                    file.verify()
        except ValueError as error:
            wrong.append(str(error))
        inside = {path: value for path, value in wanted.items() if path.startswith(name + "/")}
        here = {path: value for path, value in outcome(directory).items() if path.startswith(name + "/")}
        wrong += differences(here, inside)
    run, table = directory / "run", directory / "table.json"
    checkpoint = atomic.locate_directory(run / "checkpoint")
    if checkpoint.exists():
        state = json.loads((checkpoint / "state.json").read_text())
        wrong += [f for f, sums in state["crc32"].items() if reading.file_checksums(checkpoint / f) != sums]
    if (run / "adapter" / "adapter_config.json").exists():
        read_adapter_tensors(run / "adapter")
    if table.exists():
        read_named_table(table, "sm_87")
    return wrong


# --- points ---------------------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    name: str
    arguments: list[str]
    wanted: dict[str, Any]
    whole: Ended
    plots: bool
    counted: Counter[str] = field(default_factory=Counter)
    lost: list[dict[str, Any]] = field(default_factory=list)


def prepared(root: Path, name: str) -> Scenario:
    """The uninterrupted command; twice, so that what is no function of its input shows."""
    plots = name == "train, two epochs, state in host memory"
    seen = []
    for again in ("whole", "again"):
        place = new_place(root, again)
        ended = command(place, COMMANDS[name], plots=plots)
        if ended.code:
            raise SystemExit(f"{name}: {ended.said}")
        seen.append(outcome(place))
    if problems := differences(*seen):
        raise SystemExit(f"{name} ends with other bytes the second time: {problems}")
    return Scenario(name, COMMANDS[name], seen[0], ended, plots)


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
    """What the first kill was, how many points it and the second one are, and what went wrong, in words.

    A moment at which the command had ended already, or had written nothing yet, is none.

    Args:
        again: the command that goes on is killed as well, after so many seconds, and another one goes on.
    """
    place, arguments = new_place(root, "point"), scenario.arguments
    ended = own_process(place, arguments, at) if own else command(place, arguments, kind, at, scenario.plots)
    if ended.code == 0 and kind == "moment":
        return "ended before", 0, []
    if ended.code != -signal.SIGKILL:
        return kind, 1, [f"was to be killed, and ended with {ended.code}: {ended.said[-300:]}"]
    if kind == "moment" and not began(place):
        kind = "before it began"
    kills = int(kind != "before it began")
    problems = half_things(place, scenario.wanted)
    if again is not None and not complete(place, arguments):
        kills += command(place, going_on(place, arguments), "moment", again).code == -signal.SIGKILL
        problems += half_things(place, scenario.wanted)
    if not complete(place, arguments):
        last = command(place, going_on(place, arguments), plots=scenario.plots)
        if last.code != 0:
            return kind, kills, [*problems, f"does not go on: {last.said.strip()[-300:]}"]
    return kind, kills, problems + differences(outcome(place), scenario.wanted)


def points(
    scenario: Scenario, count: int, moments: int, draw: random.Random
) -> Iterator[tuple[str, float, bool, float | None]]:
    """(kind, at, in a process of its own, killed again after) of ``count`` exact points and ``moments`` random ones."""
    halves = min(count // 3, scenario.whole.halves)
    for kind, total, wanted in (
        ("operation", scenario.whole.operations, count - halves),
        ("half", scenario.whole.halves, halves),
    ):
        # One of each stretch of as many operations.
        for index in range(min(wanted, total)):
            first, last = 1 + index * total // wanted, (index + 1) * total // wanted
            yield kind, draw.randint(first, max(first, last)), False, None
    for index in range(moments):
        own = index % 4 == 3
        seconds = scenario.whole.seconds * draw.random()
        twice = scenario.whole.seconds * draw.random() if index % 4 == 1 else None
        yield "moment", seconds, own, twice


def make_world(root: Path) -> None:
    """Model, texts, store, adapter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **CONFIG)
    world = root / "world"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(world / "model")
    make_tokenizer(config, 0).save_pretrained(world / "model")
    draw = random.Random(0)
    for name, count in (("train.txt", 60), ("valid.txt", 16)):
        (world / name).write_text(
            " ".join(draw.choice(("the", "cat", "sees", "a", "red", "house")) for _ in range(count))
        )
    for more in (
        ["quantize", str(world / "model"), str(world / "store"), "--group-size=32"],
        ["train", str(world / "store"), f"--train-file={world / 'train.txt'}", f"--output-dir={world / 'run'}"]
        + ["--max-steps=2", "--max-length=24", "--lora-r=2", "--learning-rate=0.05", "--device=cpu"],
    ):
        if main_module.main(more):
            raise SystemExit("no world to try it in")
    shutil.move(world / "run" / "adapter", world / "adapter")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10, help="exact points of each command (default: 10)")
    parser.add_argument("--moments", type=int, default=4, help="random moments of each command (default: 4)")
    parser.add_argument("--only", action="append", default=[], help="commands whose name has this in it")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--output", type=Path, help="where the summary goes as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started, scenarios = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "runs").mkdir()
        code, _ = forked(lambda: make_world(root), root / "world.txt")
        if code:
            raise SystemExit((root / "world.txt").read_text())
        for name in COMMANDS:
            if chosen.only and not any(part in name for part in chosen.only):
                continue
            scenario = prepared(root, name)
            scenarios.append(scenario)
            draw = random.Random(zlib.crc32(f"{chosen.seed} {name}".encode()))
            for kind, at, own, again in points(scenario, chosen.points, chosen.moments, draw):
                was, kills, wrong = try_point(root, scenario, kind, at, own, again)
                what = {"kind": kind, "at": round(at, 3), "own_process": own, "again_at": again}
                scenario.counted["points"] += kills
                scenario.counted[kind] += kills
                scenario.counted["own process"] += own and was == kind
                if was != kind:
                    scenario.counted[was] += 1
                if wrong:
                    scenario.lost.append(what | {"wrong": wrong})
                    print(f"{name}: {what}: {wrong}", file=sys.stderr, flush=True)
            print(
                f"{name}: {scenario.counted['points']} points, {len(scenario.lost)} lost", file=sys.stderr, flush=True
            )
    tried, lost = sum(one.counted["points"] for one in scenarios), sum(len(one.lost) for one in scenarios)
    summary = {
        "points": tried,
        "survived": tried - lost,
        "lost": lost,
        "seed": chosen.seed,
        "seconds": round(time.perf_counter() - started),
        "environment": environment(),
        "commands": {
            one.name: {
                "arguments": one.arguments,
                "file_operations": one.whole.operations,
                "writes": one.whole.halves,
                **{kind: one.counted[kind] for kind in COUNTED},
                "lost": one.lost,
            }
            for one in scenarios
        },
    }
    print(f"{tried} points, {tried - lost} survived, {lost} lost")
    if chosen.output:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        strict_json.write_json(chosen.output, summary)
    return 1 if lost or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
