"""Bends every kind of file that a command reads, and checks that nothing is lost.

    python tests/torture/bend.py --count 2600 --output bench/results/torture/bend.json
    python tests/torture/bend.py --only 1234 --keep DIR        # one case again, its files kept

A case is a store, model, adapter, run, table, data or settings with one thing changed in it, and a command that reads
it, in a forked child with limits (every ``--process``-th in a process of its own). Its outcome is one of these:

- refused: exit code 1 or 2 and one line that names what is wrong, no traceback, nothing half-written left;
- harmless: the command's result is that of the unbent files, to the bit;
- warned: the result differs, and a line names the file because of which it does (a tuned table that is ignored);
- unchecked: the result differs, as it must: the bent file carries no checksum, see ``unchecked``;
- lost: anything else. A signal, a hang, memory without end, an exception without a name, another result.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import MIB, TEMPORARY, Ended, address_space, command, forked, own_process
from mutations import MUTATIONS, Mutation, flip_bit
from results import counted, counted_by, finish
from world import SAVED_AT, TRAIN, copy_into, scratch_and_world

SECONDS = 40  # until a command hangs; it takes less than 3
MOST_EXTRA = 3 << 30  # of address space
MOST_PEAK = 1 << 30  # of memory; it takes less than 500 MiB


@dataclass(frozen=True)
class Subject:
    """A directory whose files are bent, and the commands that read it.

    Attributes:
        place: its name in the world; every case gets a copy.
        commands: by name, a function from the copy, the world and a place for output to the command's arguments.
        files: patterns of the files that may be bent.
        unchecked: why a changed result is right whatever is bent; "" where the files carry checksums.
        weight: how often the kind is drawn, in proportion to the others.
    """

    place: str
    commands: dict[str, Callable[[Path, Path, Path], list[Any]]]
    files: tuple[str, ...] = ("**/*",)
    unchecked: str = ""
    weight: int = 1


def _eval(store: Path, world: Path, *more: Any) -> list[Any]:
    return ["eval", store, f"--validation-file={world / 'data/valid.txt'}", "--max-length=24", "--json", *more]


def _train(store: Path, out: Path, data: Path, *more: Any) -> list[Any]:
    quick = ["--max-steps=2", "--max-length=24", "--lora-r=2", "--device=cpu", "--json"]
    return ["train", store, f"--train-file={data}", f"--output-dir={out}", *quick, *more]


def _resume(run: Path, world: Path, *where: Any) -> list[Any]:
    texts = [f"--train-file={world / 'data/train.txt'}", f"--validation-file={world / 'data/valid.txt'}"]
    return ["train", world / "store", *texts, *where, *TRAIN]


STORE: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "verify": lambda bent, world, out: ["verify", bent, "--json"],
    "eval": lambda bent, world, out: _eval(bent, world),
    "generate": lambda bent, world, out: ["generate", bent, "--prompt=the cat", "--max-new-tokens=4", "--json"],
    "chat": lambda bent, world, out: ["generate", bent, "--prompt=a dog", "--chat", "--max-new-tokens=2", "--json"],
    "merge": lambda bent, world, out: ["merge", bent, out, "--dtype=float32", "--json"],
    "merge --as-store": lambda bent, world, out: ["merge", bent, out, "--as-store", "--json"],
    "train": lambda bent, world, out: _train(bent, out, world / "data/pairs.jsonl"),
    "plan": lambda bent, world, out: ["plan", bent, "--max-length=24", "--device=cpu", "--json"],
    "doctor": lambda bent, world, out: ["doctor", bent, f"--scratch-directory={world}", "--json"],
}
MODEL: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "quantize": lambda bent, world, out: ["quantize", bent, out, "--group-size=32", "--json"],
    "plan": lambda bent, world, out: ["plan", bent, "--max-length=24", "--device=cpu", "--json"],
}
ADAPTER: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "eval": lambda bent, world, out: _eval(world / "store", world, f"--adapter={bent}"),
    "generate": lambda bent, world, out: STORE["generate"](world / "store", world, out) + [f"--adapter={bent}"],
    "merge": lambda bent, world, out: STORE["merge"](world / "store", world, out) + [f"--adapter={bent}"],
    "merge --as-store": lambda bent, world, out: (
        STORE["merge --as-store"](world / "store", world, out) + [f"--adapter={bent}"]
    ),
}
RUN: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "train --resume": lambda bent, world, out: _resume(bent, world, f"--output-dir={bent}", "--resume"),
    "train --resume-from-checkpoint": lambda bent, world, out: _resume(
        bent, world, f"--output-dir={out}", f"--resume-from-checkpoint={bent / 'checkpoint'}"
    ),
}


def _data(name: str) -> dict[str, Callable[[Path, Path, Path], list[Any]]]:
    def evaluated(bent: Path, world: Path, out: Path) -> list[Any]:
        arguments = ["eval", world / "store", f"--validation-file={bent / name}", "--max-length=24", "--json"]
        return [*arguments, "--assistant-only-loss"] if name == "chats.jsonl" else arguments

    def trained(bent: Path, world: Path, out: Path) -> list[Any]:
        return _train(world / "store", out, bent / name, *(["--packing"] if name != "train.txt" else []))

    return {"eval": evaluated, "train": trained}


def _tables(flag: str) -> Callable[[Path, Path, Path], list[Any]]:
    return lambda bent, world, out: ["tune", flag, "--target=sm_87", f"--output={bent / 'sm_87.json'}", "--json"]


FOREIGN = "a format without checksums: the bent file is a whole one, of another model"
TEXT = "text to train on has no checksum: it is another text"
IN_USE = "a store cut short in use"
SUBJECTS = {
    "store": Subject("store", STORE, weight=6),
    IN_USE: Subject(
        "store", {name: STORE[name] for name in ("verify", "eval", "generate", "merge", "train")}, weight=2
    ),
    "nf4 store": Subject("nf4-store", STORE, weight=3),
    "8-bit store": Subject("8-bit-store", STORE, weight=3),
    "two-level store": Subject("two-level-store", STORE, weight=3),
    "adapter": Subject("adapter", ADAPTER, weight=3),
    "PEFT's adapter": Subject("peft-adapter", ADAPTER, ("adapter_*",), FOREIGN, weight=2),
    "run": Subject("run", RUN, ("checkpoint/*", "*.json*"), weight=5),
    "model directory": Subject("model", MODEL, unchecked=FOREIGN, weight=2),
    "sharded model directory": Subject("sharded", MODEL, ("*.safetensors*", "config.json"), FOREIGN, weight=2),
    "bitsandbytes directory": Subject(
        "bnb", MODEL, ("*.safetensors", "config.json", "tokenizer.json"), FOREIGN, weight=2
    ),
    "int4 directory": Subject("int4", MODEL, ("*.safetensors", "config.json", "tokenizer.json"), FOREIGN, weight=2),
    **{
        f"{name} directory": Subject(name, MODEL, ("*.safetensors", "config.json"), FOREIGN)
        for name in ("gptq", "awq", "mlx", "compressed", "hqq")
    },
    "GGUF file": Subject(
        "gguf",
        {"quantize": lambda bent, world, out: ["quantize", bent / "tiny.gguf", out, "--json"]},
        unchecked=FOREIGN,
        weight=3,
    ),
    "GGUF in parts": Subject(
        "gguf-parts",
        {"quantize": lambda bent, world, out: ["quantize", bent / "tiny-00002-of-00003.gguf", out, "--json"]},
        unchecked=FOREIGN,
        weight=3,
    ),
    **{
        f"data {name}": Subject("data", _data(name), (f"{name}/*" if name == "saved" else name,), TEXT)
        for name in ("train.txt", "pairs.jsonl", "chats.jsonl", "texts.parquet", "saved")
    },
    "tuned table": Subject(
        "tables",
        {"tune --report": _tables("--report")},
        unchecked="a table says which kernel runs, and the log why: what they compute is the same",
        weight=2,
    ),
    "settings": Subject(
        "settings",
        {
            "plan --config yaml": lambda bent, world, out: (
                ["plan", world / "store", f"--config={bent / 'settings.yaml'}", "--json"]
            ),
            "plan --config json": lambda bent, world, out: (
                ["plan", world / "store", f"--config={bent / 'settings.json'}", "--json"]
            ),
        },
        unchecked="settings are the user's words: other ones ask for something else",
    ),
}


@dataclass
class Case:
    """One bent file, the command that read it, and the outcome."""

    number: int
    kind: str
    command: str
    file: str
    mutation: str
    outcome: str = ""
    why: str = ""
    seconds: float = 0.0
    own_process: bool = False
    arguments: list[str] = field(default_factory=list)


def unchecked(subject: Subject, case: Case, mutation: Mutation, written: list[Path]) -> str:
    """Returns why a result that differs is no fault of the reader; "" where it is one."""
    if subject.unchecked:
        return subject.unchecked
    if mutation.forges:
        return "the checksums were forged to match: they tell damage, not who wrote a file"
    if case.kind == "run" and case.file == "metrics.jsonl" and _steps_are_there(written):
        return "a step's line has no checksum: it is a record, from which nothing but a plot is made"
    return ""


def _steps_are_there(written: list[Path]) -> bool:
    """Whether ``metrics.jsonl`` has all steps before the checkpoint, or the last of them, as a continued run has."""
    (path,) = [path for path in written if path.name == "metrics.jsonl"]
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    before = [step for step in steps if step < SAVED_AT]
    return bool(before) and before == list(range(SAVED_AT))[-len(before) :]


def _files(place: Path, subject: Subject) -> list[Path]:
    """The files below ``place`` that may be bent."""
    return sorted({path for pattern in subject.files for path in place.glob(pattern) if path.is_file()})


def _bend_one(copy: Path, subject: Subject, draw: random.Random, wanted: Mutation | None) -> tuple[Mutation, str]:
    """Changes one thing in the copy. Returns the mutation, and the relative path of the bent file.

    Args:
        wanted: is tried on some files before others are drawn; where it changes none of them, others follow.
    """
    files = _files(copy, subject)
    for number in itertools.count():
        if wanted is not None and number < 20:
            mutation, path = wanted, draw.choice([path for path in files if wanted.takes(path)])
        else:
            path = draw.choice(files)
            mutation = draw.choice([one for one in MUTATIONS if one.takes(path)])
        before = path.read_bytes()
        mutation.apply(path, draw)
        if not path.is_file() or path.is_symlink() or path.read_bytes() != before or mutation.changes_others:
            return mutation, str(path.relative_to(copy))
    raise AssertionError("the count has no end")


def in_turn(world: Path, kinds: list[str], count: int) -> Iterator[tuple[str, Mutation | None]]:
    """Yields a command and a mutation for each number, so that all commands and mutations occur in few cases.

    Commands follow each other within their kind. Of the mutations that a kind's files take, the one that was used least
    comes next, and those for few kinds of files come before those for all.
    """
    taken = {kind: [one for one in reversed(MUTATIONS) if _takes_any(world, kind, one)] for kind in kinds}
    turns: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        names = list(SUBJECTS[kind].commands)
        mutation = None if kind == IN_USE else min(taken[kind], key=lambda one: used[one.name])
        yield names[turns[kind] % len(names)], mutation
        turns[kind] += 1
        if mutation is not None:
            used[mutation.name] += 1


def _takes_any(world: Path, kind: str, mutation: Mutation) -> bool:
    subject = SUBJECTS[kind]
    return any(mutation.takes(path) for path in _files(world / subject.place, subject))


def result(ended: Ended, place: Path, written: list[Path]) -> str:
    """Returns what a command answered and digests of what it wrote, without times, memory and paths."""
    parts: list[Any] = []
    if ended.out.strip():
        answer = json.loads(ended.out)
        parts.append(_timeless(answer))
    for root in written:
        for path in sorted([root, *root.rglob("*")]):
            name = str(path.relative_to(root.parent))
            if name.endswith((".png", "run.json")) or not path.is_file():
                continue
            if path.name == "metrics.jsonl":
                parts.append([name, [_timeless(json.loads(line)) for line in path.read_text().splitlines()]])
            elif path.suffix == ".json":
                parts.append([name, _timeless(json.loads(path.read_text()))])
            else:
                parts.append([name, hashlib.sha256(path.read_bytes()).hexdigest()])
    return json.dumps(parts, sort_keys=True).replace(str(place), "")


# Keys of JSON whose values differ from process to process: times and measured peaks of a training, and the seal over
# them; in a plan, the measured memory of the libraries and the sums that it is part of; in a doctor's answer, what is
# free on the machine, and how fast its disks are.
VOLATILE = {"seconds", "seconds_waiting_for_data", "seconds_per_step_median", "tokens_per_second", "seal"}
VOLATILE |= {"peak_rss_bytes", "peak_rss_anonymous_bytes"}
VOLATILE |= {"framework", "total_bytes", "host_peak_bytes", "planned_peak_bytes"}
VOLATILE |= {"memory", "available_memory_bytes", "page_cache", "scratch_directory", "advice"}
VOLATILE |= {"store_speed", "store_bytes_per_second", "scratch_speed", "scratch_bytes_per_second"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in VOLATILE}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


class Bender:
    """Runs cases by number: the same options and number make the same case.

    Args:
        world: is only read. scratch: where the copies lie.
        options: of the command line.
    """

    def __init__(self, world: Path, scratch: Path, options: argparse.Namespace) -> None:
        self.world, self.scratch, self.options = world, scratch, options
        self.keep: Path | None = None
        self.truth: dict[tuple[str, str], str] = {}
        self.kinds = [name for name in options.kinds.split(",") for _ in range(SUBJECTS[name].weight)]
        most = options.first + options.count
        self.turns = list(in_turn(world, self.kinds, most)) if options.in_turn else None

    def measure(self, kind: str, name: str) -> None:
        """Keeps what the command answers to the unbent files."""
        if (kind, name) in self.truth:
            return
        place = Path(tempfile.mkdtemp(dir=self.scratch))
        copy, out, arguments = self._prepare(place, kind, name)
        ended = forked(command(arguments), seconds=10 * SECONDS)
        if ended.code != 0:
            raise RuntimeError(f"unbent {kind}, {name}: {ended.err[-2000:]}")
        self.truth[kind, name] = result(ended, place, self._written(copy, out, name))
        shutil.rmtree(place)

    def _prepare(self, place: Path, kind: str, name: str) -> tuple[Path, Path, list[str]]:
        subject = SUBJECTS[kind]
        copy, out = place / subject.place, place / "out"
        copy_into(self.world / subject.place, copy)
        return copy, out, [str(part) for part in subject.commands[name](copy, self.world, out)]

    def _written(self, copy: Path, out: Path, name: str) -> list[Path]:
        run = [copy / "adapter", copy / "checkpoint", copy / "metrics.jsonl"]
        return [*run, out] if name == "train --resume" else [out]

    def run(self, number: int) -> Case:
        """Runs the case of this number."""
        draw = random.Random(f"{self.options.seed}:{number}")
        kind = self.kinds[number % len(self.kinds)]
        subject = SUBJECTS[kind]
        name, wanted = (draw.choice(list(subject.commands)), None) if self.turns is None else self.turns[number]
        self.measure(kind, name)
        place = Path(tempfile.mkdtemp(dir=self.scratch))
        copy, out, arguments = self._prepare(place, kind, name)
        before = None
        if kind == IN_USE:
            at, keep = draw.randint(1, 40), draw.choice((0, 4096, 8192))
            mutation, file, before = Mutation("cut after a check", flip_bit), f"check {at}", _cutting(at, keep)
        else:
            mutation, file = _bend_one(copy, subject, draw, wanted)
        case = Case(number, kind, name, file, mutation.name, arguments=arguments)
        if self.keep is not None:
            shutil.copytree(copy, self.keep, symlinks=True, ignore=_no_fifos)
        case.own_process = number % self.options.process == 0 and before is None
        if case.own_process:
            ended = forked(own_process(arguments), seconds=10 * SECONDS)
        else:
            ended = _forked(arguments, before, self.options.planted)
        case.seconds = ended.seconds
        case.outcome, case.why = self._judge(case, subject, mutation, ended, place, self._written(copy, out, name))
        shutil.rmtree(place, ignore_errors=True)
        return case

    def _judge(
        self, case: Case, subject: Subject, mutation: Mutation, ended: Ended, place: Path, written: list[Path]
    ) -> tuple[str, str]:
        if fault := ended.fault():
            return "lost", fault
        if ended.peak > MOST_PEAK:
            return "lost", f"took {ended.peak // MIB} MiB of memory"
        # A process that a lost page ended leaves its temporaries to the next one, as one that was killed does.
        lost_page = "was cut short while it was in use" in ended.err
        if (stray := [path for path in place.rglob(f"{TEMPORARY}*")]) and not lost_page:
            return "lost", f"left {stray[0].name}"
        if ended.code:
            line = ended.lines()[0].replace(str(place), "").replace(str(self.world), "")
            if "out of memory" in line or "MemoryError" in line:
                return "lost", f"asked for too much memory: {line[:200]}"
            if case.command in ("quantize", "merge", "merge --as-store") and (place / "out").exists():
                return "lost", "refused, and left an output"
            return "refused", line[:300]
        try:
            found = result(ended, place, written)
        except (ValueError, OSError) as error:
            return "lost", f"answered what cannot be read: {error}"
        if found == self.truth[case.kind, case.command]:
            return "harmless", ""
        if Path(case.file).name in ended.err and "mebp: warning:" in ended.err:
            return "warned", next(line for line in ended.err.splitlines() if "mebp: warning:" in line)[-200:]
        reason = unchecked(subject, case, mutation, written)
        return ("unchecked", reason) if reason else ("lost", "another result, without a word")


def _no_fifos(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if not Path(directory, name).is_file() and not Path(directory, name).is_dir()]


def _forked(arguments: list[str], before: Callable[[], None] | None, planted: bool) -> Ended:
    def limit() -> None:
        address_space(MOST_EXTRA)()
        if before is not None:
            before()
        if planted:
            _compare_no_weights()

    return forked(command(arguments), limit, SECONDS)


def _compare_no_weights() -> None:
    """A planted fault: the checksums of weights are compared with nothing."""
    from mebp_triton.store.reader import StoreFile

    StoreFile.verify = lambda self, again=False: None  # type: ignore[method-assign]


def _cutting(at: int, keep: int) -> Callable[[], None]:
    """Returns a function after which a mapped file is cut short, right after its ``at``-th size check.

    Args:
        keep: bytes that are left of it.
    """

    def install() -> None:
        from mebp_triton.system.mapped_file import MappedFile

        check, count = MappedFile.check, 0

        def checked(mapped: Any) -> None:
            nonlocal count
            check(mapped)
            count += 1
            if count == at:
                os.truncate(mapped.path, min(keep, mapped.size))

        MappedFile.check = checked  # type: ignore[method-assign]

    return install


def work(bender: Bender, numbers: Sequence[int], path: Path) -> None:
    """Runs cases; each becomes a line of ``path``."""
    with open(path, "a", encoding="utf-8") as file:
        for number in numbers:
            file.write(json.dumps(vars(bender.run(number))) + "\n")
            file.flush()


def bend(options: argparse.Namespace) -> list[Case]:
    """Runs the cases of the command line in some processes."""
    with scratch_and_world("bend", options.world) as (root, world):
        children = []
        for worker in range(options.workers):
            scratch, found = root / f"scratch-{worker}", root / f"found-{worker}.jsonl"
            scratch.mkdir()
            found.touch()
            numbers = range(options.first + worker, options.first + options.count, options.workers)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(Bender(world, scratch, options), numbers, found)
                    code = 0
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        lines = [line for path in root.glob("found-*.jsonl") for line in path.read_text().splitlines()]
        cases = [Case(**json.loads(line)) for line in lines]
    if any(statuses) or len(cases) != options.count:
        raise RuntimeError(f"{len(cases)} of {options.count} cases ran")
    return sorted(cases, key=lambda case: case.number)


def summary(cases: list[Case]) -> dict[str, Any]:
    """Counts by kind, command and mutation, the reasons of unchecked cases, and all cases that were lost."""
    return {
        **counted(cases, OUTCOMES),
        "in_processes_of_their_own": sum(case.own_process for case in cases),
        "by_kind": counted_by(cases, lambda case: case.kind, OUTCOMES),
        "by_command": counted_by(cases, lambda case: case.command, OUTCOMES),
        "by_mutation": counted_by(cases, lambda case: case.mutation, OUTCOMES),
        "why_unchecked": dict(Counter(case.why for case in cases if case.outcome == "unchecked")),
        "lost_cases": [
            {"number": case.number, "kind": case.kind, "command": case.command, "file": case.file}
            | {"mutation": case.mutation, "why": case.why}
            for case in cases
            if case.outcome == "lost"
        ],
    }


OUTCOMES = ("refused", "harmless", "warned", "unchecked", "lost")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2600, help="cases to try (default: 2600)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-turn", action="store_true", help="draws no command or mutation: all occur in few cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--process", type=int, default=50, metavar="N", help="every N-th as a process of its own")
    parser.add_argument("--kinds", default=",".join(SUBJECTS), help="what to bend, separated by commas")
    parser.add_argument("--world", type=Path, help="made by world.py; by default a new one")
    parser.add_argument("--planted", action="store_true", help="no weight is compared: cases must be lost")
    parser.add_argument("--output", type=Path, help="where the summary goes as JSON")
    parser.add_argument("--cases", type=Path, help="where all cases go as JSON, one a line")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="runs this case alone")
    parser.add_argument("--keep", type=Path, help="where --only leaves what it bent")
    options = parser.parse_args()
    if options.only is not None:
        with scratch_and_world("bend", options.world) as (root, world):
            scratch = root / "scratch"
            scratch.mkdir()
            bender = Bender(world, scratch, options)
            bender.keep = options.keep
            case = bender.run(options.only)
        print(json.dumps(vars(case), indent=2))
        return int(case.outcome == "lost")
    started = time.perf_counter()
    cases = bend(options)
    if options.cases:
        options.cases.write_text("".join(json.dumps(vars(case)) + "\n" for case in cases))
    found = {"seed": options.seed, "seconds": round(time.perf_counter() - started), **summary(cases)}
    return finish(found, options.output)


if __name__ == "__main__":
    sys.exit(main())
