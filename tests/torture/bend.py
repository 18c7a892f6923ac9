"""Bends every kind of file that a command reads, and sees that nothing is lost.

    python tests/torture/bend.py --count 2600 --output bench/results/torture/bend.json
    python tests/torture/bend.py --only 1234 --keep DIR        # one case again, its files kept

A case is a whole store, model, adapter, run, table, data or settings with one thing changed in it, and a command that
reads it, in a forked child with limits (every ``--process``-th in a process of its own). It is

- refused: exit code 1 or 2 and one line that names what is wrong, no traceback, nothing half-written left;
- harmless: the command's result is that of the unbent files, to the bit;
- warned: the result differs, and a line named the file that is why (a tuned table that is ignored);
- unchecked: the result differs, as it must: what was bent carries no checksum, see ``unchecked``;
- lost: anything else. A signal, a hang, memory without end, an exception without a name, another result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from forked import MIB, Ended, address_space, command, forked, import_all  # noqa: E402
from mutations import MUTATIONS, Mutation, flip_bit  # noqa: E402
from results import counted, counted_by, finish  # noqa: E402
from world import SAVED_AT, TRAIN, copy_into, make_world  # noqa: E402

SECONDS = 40  # until a command hangs; it takes less than 3
MOST_EXTRA = 3 << 30  # of address space
MOST_PEAK = 1 << 30  # of memory; it takes less than 500 MiB
TEMPORARY = ".mebp-tmp-"


@dataclass(frozen=True)
class Subject:
    """What is bent, and who reads it.

    Attributes:
        place: the directory of the world that is copied.
        commands: by name, the arguments, given the copy, the world and a place for output. What has no "output" among
            them writes nothing.
        files: those that may be bent, by pattern; all by default.
        unchecked: why a changed result is right whatever is bent; "" where the files carry checksums.
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
    "adapter": Subject("adapter", ADAPTER, weight=3),
    "PEFT's adapter": Subject("peft-adapter", ADAPTER, ("adapter_*",), FOREIGN, weight=2),
    "run": Subject("run", RUN, ("checkpoint/*", "*.json*"), weight=5),
    "model directory": Subject("model", MODEL, unchecked=FOREIGN, weight=2),
    "sharded model directory": Subject("sharded", MODEL, ("*.safetensors*", "config.json"), FOREIGN, weight=2),
    "bitsandbytes directory": Subject(
        "bnb", MODEL, ("*.safetensors", "config.json", "tokenizer.json"), FOREIGN, weight=2
    ),
    "int4 directory": Subject("int4", MODEL, ("*.safetensors", "config.json", "tokenizer.json"), FOREIGN, weight=2),
    "GGUF file": Subject(
        "gguf",
        {"quantize": lambda bent, world, out: ["quantize", bent / "tiny.gguf", out, "--json"]},
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
    """What was done, and what came of it."""

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
    """Why a result that differs is no fault of the reader; "" where it is one."""
    if subject.unchecked:
        return subject.unchecked
    if mutation.forges:
        return "the checksums were forged to match: they tell damage, not who wrote a file"
    if case.kind == "run" and case.file == "metrics.jsonl" and _steps_are_there(written):
        return "a step's line has no checksum: it is a record, from which nothing but a plot is made"
    return ""


def _steps_are_there(written: list[Path]) -> bool:
    """Whether ``metrics.jsonl`` has the last steps before the checkpoint, or all: a run may go on from another."""
    (path,) = [path for path in written if path.name == "metrics.jsonl"]
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    before = [step for step in steps if step < SAVED_AT]
    return bool(before) and before == list(range(SAVED_AT))[-len(before) :]


def _bent(case_directory: Path, subject: Subject, draw: random.Random) -> tuple[Mutation, str]:
    """Changes one thing in the copy; a mutation that does not apply to the file gives way to another."""
    found = sorted({path for pattern in subject.files for path in case_directory.glob(pattern) if path.is_file()})
    while True:
        path = draw.choice(found)
        mutation = draw.choice([one for one in MUTATIONS if one.takes(path)])
        before = path.read_bytes()
        mutation.apply(path, draw)
        if not path.is_file() or path.is_symlink() or path.read_bytes() != before or mutation.changes_others:
            return mutation, str(path.relative_to(case_directory))


def result(ended: Ended, place: Path, written: list[Path]) -> str:
    """A digest of what a command answered and wrote, without times, memory and where it lay."""
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


# What differs from process to process, by its whole name: times and measured peaks of a training, and the seal over
# them; in a plan, the measured memory of the libraries and the sums that it is part of; in a doctor's answer, what the
# machine has free, and how fast its disks are.
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
    """Runs cases by number: the same seed and number make the same case."""

    def __init__(self, world: Path, scratch: Path, seed: int, process_every: int, kinds: list[str]) -> None:
        self.world, self.scratch, self.seed, self.process_every = world, scratch, seed, process_every
        self.keep: Path | None = None
        self.truth: dict[tuple[str, str], str] = {}
        self.kinds = [name for name in kinds for _ in range(SUBJECTS[name].weight)]

    def measure(self, kind: str, name: str) -> None:
        """What the command answers to the unbent files."""
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
        draw = random.Random(f"{self.seed}:{number}")
        kind = self.kinds[number % len(self.kinds)]
        subject = SUBJECTS[kind]
        name = draw.choice(list(subject.commands))
        self.measure(kind, name)
        place = Path(tempfile.mkdtemp(dir=self.scratch))
        copy, out, arguments = self._prepare(place, kind, name)
        before = None
        if kind == IN_USE:
            at, keep = draw.randint(1, 40), draw.choice((0, 4096, 8192))
            mutation, file, before = Mutation("cut after a check", flip_bit), f"check {at}", _cutting(at, keep)
        else:
            mutation, file = _bent(copy, subject, draw)
        case = Case(number, kind, name, file, mutation.name, arguments=arguments)
        if self.keep is not None:
            shutil.copytree(copy, self.keep, symlinks=True, ignore=_no_fifos)
        case.own_process = number % self.process_every == 0 and before is None
        ended = _own_process(arguments) if case.own_process else _forked(arguments, before)
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


def _forked(arguments: list[str], before: Callable[[], None] | None = None) -> Ended:
    def limit() -> None:
        address_space(MOST_EXTRA)()
        if before is not None:
            before()

    return forked(command(arguments), limit, SECONDS)


def _cutting(at: int, keep: int) -> Callable[[], None]:
    """A mapped file is cut right after the ``at``-th time that its size was found right."""

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


def _own_process(arguments: list[str]) -> Ended:
    """The command as a user starts it."""

    def start() -> int:
        os.execv(sys.executable, [sys.executable, "-m", "mebp_triton.cli", *arguments])

    return forked(start, seconds=10 * SECONDS)


def work(bender: Bender, numbers: list[int], path: Path) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for number in numbers:
            file.write(json.dumps(vars(bender.run(number))) + "\n")
            file.flush()


def bend(count: int, seed: int, workers: int, process_every: int, kinds: list[str], first: int = 0) -> list[Case]:
    """Runs ``count`` cases in some processes."""
    with tempfile.TemporaryDirectory(prefix="mebp-bend-") as name:
        root = Path(name)
        import_all()
        (root / "world").mkdir()
        make_world(root / "world")
        children = []
        for worker in range(workers):
            scratch, found = root / f"scratch-{worker}", root / f"found-{worker}.jsonl"
            scratch.mkdir()
            found.touch()
            numbers = list(range(first + worker, first + count, workers))
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(Bender(root / "world", scratch, seed, process_every, kinds), numbers, found)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        lines = [line for path in root.glob("found-*.jsonl") for line in path.read_text().splitlines()]
        cases = [Case(**json.loads(line)) for line in lines]
    if any(statuses) or len(cases) != count:
        raise RuntimeError(f"{len(cases)} of {count} cases ran")
    return sorted(cases, key=lambda case: case.number)


def summary(cases: list[Case]) -> dict[str, Any]:
    """Counts by kind, by mutation and by command; the reasons of what is unchecked; all that was lost."""

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
    parser.add_argument("--count", type=int, default=2600, help="cases to try")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--process", type=int, default=50, metavar="N", help="every N-th as a process of its own")
    parser.add_argument("--kinds", default=",".join(SUBJECTS), help="what to bend, separated by commas")
    parser.add_argument("--output", type=Path, help="the summary as JSON")
    parser.add_argument("--cases", type=Path, help="all cases as JSON, one a line")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--keep", type=Path, help="where --only leaves what it bent")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if arguments.only is not None:
        with tempfile.TemporaryDirectory(prefix="mebp-bend-") as name:
            import_all()
            make_world(Path(name))
            scratch = Path(name) / "scratch"
            scratch.mkdir()
            bender = Bender(Path(name), scratch, arguments.seed, arguments.process, kinds)
            bender.keep = arguments.keep
            case = bender.run(arguments.only)
        print(json.dumps(vars(case), indent=2))
        return int(case.outcome == "lost")
    started = time.perf_counter()
    cases = bend(arguments.count, arguments.seed, arguments.workers, arguments.process, kinds, arguments.first)
    if arguments.cases:
        arguments.cases.write_text("".join(json.dumps(vars(case)) + "\n" for case in cases))
    found = {"seed": arguments.seed, "seconds": round(time.perf_counter() - started), **summary(cases)}
    return finish(found, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
