"""Runs commands into full disks and limits: they say so in one line, lose nothing, and leave nothing behind.

    python tests/torture/limits.py --output bench/results/torture/limits.json

Each of quantize, train, train --resume, merge (to a model and to a store) and tune runs

- on a file system (tmpfs) with too little room, from none up to what it needs;
- under RLIMIT_FSIZE, from one byte up to its largest file;
- under RLIMIT_AS, from what the process has up to what it needs;
- into a directory that cannot be written, by mode (as another user) and by a read-only mount;
- with its n-th file operation failing (ENOSPC, EIO, a short write), for every n.

After each run the exit code is 0, or 1 or 2 with one line; there is no temporary file; the output is absent or whole;
and where a checkpoint was, there is one that resumes to the adapter of an uninterrupted run, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import (
    MIB,
    TEMPORARY,
    Ended,
    address_space,
    command,
    forked,
    own_process,
    rank_without_compiling,
    remove_nothing,
)
from results import counted, counted_by, finish
from world import TRAIN, copy_into, make_wide, scratch_and_world

NOBODY = 65534  # a user without rights
MOST_BYTES = 1 << 22  # under which every file of the small world stays


@dataclass
class Point:
    """One run under a limit: the command, the limit, its value, and the outcome."""

    command: str
    limit: str
    value: str
    outcome: str = ""
    why: str = ""


class Bench:
    """The commands over one small world. Each gets a directory of its own, ``place``, and writes there.

    Args:
        model, store, adapter: in place of the world's small ones.
        planted: commands remove no file; points must be lost then.
    """

    def __init__(
        self,
        world: Path,
        model: Path | None = None,
        store: Path | None = None,
        adapter: Path | None = None,
        planted: bool = False,
    ) -> None:
        self.world, self.is_wide, self.planted = world, model is not None, planted
        texts = [f"--train-file={world / 'data/train.txt'}"]
        model, store, adapter = model or world / "model", store or world / "store", adapter or world / "adapter"
        self.arguments: dict[str, Callable[[Path], list[Any]]] = {
            "quantize": lambda place: ["quantize", model, place / "out", "--group-size=32"],
            "quantize GGUF": lambda place: ["quantize", world / "gguf/tiny.gguf", place / "out"],
            "train": lambda place: ["train", store, *texts, f"--output-dir={place / 'out'}", *TRAIN],
            "train --resume": lambda place: (
                ["train", store, *texts, f"--output-dir={place / 'out'}", "--resume", *TRAIN]
            ),
            "merge": lambda place: ["merge", store, place / "out", f"--adapter={adapter}", "--dtype=float32"],
            "merge --as-store": lambda place: ["merge", store, place / "out", f"--adapter={adapter}", "--as-store"],
            "tune": lambda place: (
                ["tune", "--offline", "--target=sm_87", "--shapes=128x128", "--m=16", "--limit=2"]
                + [f"--output={place / 'sm_87.json'}"]
            ),
        }
        self.tried = list(self.arguments)
        self.truth = ""

    def prepare(self, name: str, place: Path) -> None:
        """Lays down what the command goes on with: for ``train --resume`` an interrupted run, for ``tune`` a table."""
        if name == "train --resume":
            copy_into(self.world / "run", place / "out")
        if name == "tune":
            copy_into(self.world / "tables/sm_87.json", place / "sm_87.json")

    def run(
        self,
        name: str,
        place: Path,
        before: Callable[[], None] | None = None,
        install: Callable[[], None] | None = None,
    ) -> Ended:
        """Runs a command in a child. ``before`` sets the child's limits, ``install`` replaces functions in it."""
        start = command(self.arguments[name](place))

        def work() -> int:
            os.environ["TMPDIR"] = str(place)  # scratch files
            tempfile.tempdir = None
            rank_without_compiling()
            if self.planted:
                remove_nothing()
            if install is not None:
                install()
            return start()

        return forked(work, before, seconds=180)

    def wide(self, place: Path) -> Bench:
        """The same commands over the model of 100 MB at ``place``: it does not fit into a small process's leftovers."""
        wide = Bench(self.world, place / "wide-model", place / "wide-store", place / "wide-adapter", self.planted)
        wide.tried = [name for name in self.tried if name not in ("quantize GGUF", "tune", "train --resume")]
        return wide

    def whole(self, name: str, place: Path, finished: bool) -> str:
        """Returns what is wrong with the files that ``name`` left at ``place``; "" if nothing is.

        Args:
            finished: the command ended with exit code 0. If not, an absent output is fine.
        """
        stray = [path.name for path in place.rglob(f"{TEMPORARY}*")]
        if stray:
            return f"left {stray[0]}"
        if name == "tune":
            ended = forked(command(["tune", "--report", "--target=sm_87", f"--output={place / 'sm_87.json'}"]))
            if ended.code != 0:
                return f"the table is damaged: {ended.err.strip()[-200:]}"
            same = (place / "sm_87.json").read_bytes() == (self.world / "tables/sm_87.json").read_bytes()
            return "finished without a new entry" if finished and same else ""
        out = place / "out"
        if name.startswith("train"):
            return self._resumes(out, finished)
        if not out.exists():
            return "finished without an output" if finished else ""
        is_store = name != "merge"
        ended = forked(command(["verify", out] if is_store else ["quantize", out, place / "again"]))
        return "" if ended.code == 0 else f"a half-written output: {ended.err.strip()[-200:]}"

    def _resumes(self, run: Path, finished: bool) -> str:
        """Checks that the run goes on from its checkpoint to the adapter that it would have had; "" if it does."""
        from mebp_triton.system import atomic

        if finished and not ((run / "checkpoint" / "state.json").exists() and (run / "run.json").exists()):
            return "finished without a checkpoint or results"
        if not (atomic.locate_directory(run / "checkpoint") / "state.json").exists():
            left = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()] if run.exists() else []
            harmless = {"metrics.jsonl", "evaluation_before.json"}
            return f"without a checkpoint, left {left}" if set(left) - harmless else ""
        ended = self.run("train --resume", run.parent)
        if ended.code != 0:
            return f"does not resume: {ended.err.strip()[-300:]}"
        if self.is_wide:  # a run of this model is not repeated for each point
            return ""
        return "" if result_of(run) == self.truth else "resumed to another result"

    def learn(self, scratch: Path) -> None:
        """Keeps what an uninterrupted run ends with."""
        place = Path(tempfile.mkdtemp(dir=scratch))
        ended = self.run("train", place)
        assert ended.code == 0, ended.err
        self.truth = result_of(place / "out")

    def judge(self, point: Point, ended: Ended, place: Path) -> Point:
        """Fills in the outcome of a point."""
        if fault := ended.fault():
            point.outcome, point.why = "lost", fault
        elif wrong := self.whole(point.command, place, ended.code == 0):
            point.outcome, point.why = "lost", f"(exit code {ended.code}) {wrong}"
        elif ended.code == 0:
            point.outcome = "finished"
        else:
            point.outcome, point.why = "refused", ended.lines()[0].replace(str(place), "")[:200]
        return point


def result_of(run: Path) -> str:
    """A digest of a run's adapter, and its losses."""
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return f"{hashlib.sha256(adapter).hexdigest()} {losses}"


# --- the limits -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """Yields a new tmpfs of ``size`` bytes; OSError where none can be mounted."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        place.rmdir()
        raise OSError(done.returncode, f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def used(place: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in place.rglob("*"))


def disk_points(bench: Bench, scratch: Path, steps: int) -> Iterator[Point]:
    """A file system with room for a part of what the command writes."""
    for name in bench.tried:
        with mounted(scratch / "roomy", 64 * MIB) as place:
            bench.prepare(name, place)
            before = used(place)
            assert bench.run(name, place).code == 0
            most = used(place) - before
        for step in range(steps + 1):
            room = most * step // steps // 4096 * 4096
            with mounted(scratch / "full", 64 * MIB) as place:
                bench.prepare(name, place)
                free = os.statvfs(place)
                leave = room + 4096 * (step == 0)
                filler = place / "filler"
                with open(filler, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(free.f_bfree * free.f_bsize - leave, 4096))
                ended = bench.run(name, place)
                filler.unlink()
                yield bench.judge(Point(name, "full disk", f"{room} of {most} bytes free"), ended, place)


def file_size_points(bench: Bench, scratch: Path, steps: int) -> Iterator[Point]:
    """File-size limits from one byte to ``MOST_BYTES``, in ``steps`` equal factors."""
    for name in bench.tried:
        for step in range(steps):
            limit = round(MOST_BYTES ** (step / max(steps - 1, 1)))
            place = Path(tempfile.mkdtemp(dir=scratch))
            bench.prepare(name, place)

            def lower(limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            ended = bench.run(name, place, lower if limit > 4096 else _with_output_elsewhere(lower))
            yield bench.judge(Point(name, "RLIMIT_FSIZE", f"{limit} bytes"), ended, place)
            shutil.rmtree(place)


def _with_output_elsewhere(lower: Callable[[], None]) -> Callable[[], None]:
    """Returns ``lower`` for a limit that the output would exceed, which is a file too.

    The output goes through a pipe to a process without the limit.
    """

    def redirect_and_lower() -> None:
        for number in (1, 2):
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.close(writing)
                with open(reading, "rb") as source:
                    while data := source.read1(1 << 16):
                        os.write(number, data)
                os._exit(0)
            os.close(reading)
            os.dup2(writing, number)
            os.close(writing)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the old one believes that it can seek
        lower()

    return redirect_and_lower


def address_space_points(bench: Bench, scratch: Path, steps: int) -> Iterator[Point]:
    """Limits 1 MiB to 1 GiB above what the process has; some on a process of its own from its first instruction."""
    make_wide(scratch)
    bench = bench.wide(scratch)
    for name in bench.tried:
        for step in range(steps):
            extra = int(MIB * 2 ** (step * 10 / max(steps - 1, 1)))
            place = Path(tempfile.mkdtemp(dir=scratch))
            bench.prepare(name, place)

            ended = bench.run(name, place, address_space(extra))
            yield bench.judge(Point(name, "RLIMIT_AS", f"{extra // MIB} MiB more"), ended, place)
            shutil.rmtree(place)
    for size in (256, 512, 1024, 1536, 2048, 3072)[: max(steps // 2, 1)]:
        place = Path(tempfile.mkdtemp(dir=scratch))

        def limit(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (size * MIB, resource.RLIM_INFINITY))

        ended = forked(own_process(bench.arguments["quantize"](place)), limit, seconds=300)
        yield bench.judge(Point("quantize", "RLIMIT_AS", f"{size} MiB in all"), ended, place)
        shutil.rmtree(place)


def read_only_points(bench: Bench, scratch: Path) -> Iterator[Point]:
    for name in bench.tried:
        for way in ("mode", "mount"):
            with mounted(scratch / "read-only", 64 * MIB) as place:
                bench.prepare(name, place)
                before = _tree(place)
                if way == "mode":
                    for path in [place, *place.rglob("*")]:
                        os.chmod(path, 0o555 if path.is_dir() else 0o444)
                    ended = bench.run(name, place, _as_nobody)
                else:
                    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
                    ended = bench.run(name, place)
                    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
                changed = _tree(place) != before
                for path in [place, *place.rglob("*")]:
                    os.chmod(path, 0o755 if path.is_dir() else 0o644)
                point = bench.judge(Point(name, "read-only directory", way), ended, place)
                if point.outcome != "lost" and (changed or ended.code == 0):
                    point.outcome, point.why = "lost", "something was written"
                yield point


def _as_nobody() -> None:
    """Gives up root's rights, by which it may write anywhere."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


class Failing:
    """Makes the n-th file operation of a process fail: a write, an allocation, a new file, a rename, a sync, ...

    Args:
        n: from 1.
        how: "ENOSPC", "EIO", or "short": half of a write, then ENOSPC.
    """

    NAMED = ("open", "replace", "rename", "chmod", "mkdir")
    NAMES = (*NAMED, "write", "pwrite", "fsync", "posix_fallocate")

    def __init__(self, n: int, how: str) -> None:
        self.n, self.how = n, how

    def install(self, count: memoryview) -> None:
        """Replaces the functions that operate on files. ``count`` is shared with the parent."""
        from mebp_triton.system import atomic

        self.count = count
        for name in self.NAMES:
            setattr(os, name, self._wrap(getattr(os, name), name))
        for owner, name in ((tempfile, "mkstemp"), (tempfile, "mkdtemp"), (tempfile, "TemporaryFile")):
            setattr(owner, name, self._wrap(getattr(owner, name), name))
        real = Path.write_bytes
        Path.write_bytes = self._wrap(real, "write_bytes")  # type: ignore[method-assign]
        atomic.open = self._open  # type: ignore[attr-defined]

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        """Stands in for ``open`` in ``atomic``, so that writes to its files are counted too."""
        file = open(path, mode, **options)  # noqa: SIM115 - the caller's
        if not set(mode) & set("wax+"):
            return file
        return _FailingFile(file, self)

    def _wrap(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & (os.O_WRONLY | os.O_RDWR)):
                return original(*arguments, **options)
            if self.is_next():
                if self.how == "short":
                    self._half(original, name, arguments, options)
                named = arguments[:1] if name in self.NAMED else ()  # as in the system's own errors
                raise OSError(*self.error(), *map(os.fspath, named))
            return original(*arguments, **options)

        return operation

    def is_next(self) -> bool:
        """Counts an operation; whether it is the one that fails."""
        self.count[0] += 1
        return self.count[0] == self.n

    def error(self) -> tuple[int, str]:
        code = errno.EIO if self.how == "EIO" else errno.ENOSPC
        return code, os.strerror(code)

    def _half(self, original: Callable[..., Any], name: str, arguments: Any, options: Any) -> None:
        """Does half of a write, as on a disk that fills up meanwhile."""
        if name in ("write", "pwrite"):
            original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
        if name == "write_bytes":
            original(arguments[0], arguments[1][: len(arguments[1]) // 2])


class _FailingFile:
    """A file whose writes count as operations."""

    def __init__(self, file: Any, failing: Failing) -> None:
        self._file, self._failing = file, failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        if self._failing.is_next():
            if self._failing.how == "short":
                half = data if isinstance(data, str) else memoryview(data).cast("B")
                self._file.write(half[: len(half) // 2])
            raise OSError(*self._failing.error())
        return self._file.write(data)


WAYS = ("ENOSPC", "EIO", "short")


def operation_points(bench: Bench, scratch: Path, every: int, in_turn: bool) -> Iterator[Point]:
    """Every ``every``-th operation fails, in each way; or, ``in_turn``, in one way after the other."""
    sequences = [itertools.cycle(WAYS)] if in_turn else [itertools.repeat(how) for how in WAYS]
    for name in bench.tried:
        for ways in sequences:
            for n, how in zip(itertools.count(1, every), ways):
                place = Path(tempfile.mkdtemp(dir=scratch))
                bench.prepare(name, place)
                ended, count = _run_failing(bench, name, place, Failing(n, how))
                if count >= n:
                    yield bench.judge(Point(name, f"operation fails: {how}", str(n)), ended, place)
                shutil.rmtree(place, ignore_errors=True)
                if count < n:  # the command has fewer operations
                    break


def _run_failing(bench: Bench, name: str, place: Path, failing: Failing) -> tuple[Ended, int]:
    """Runs a command of which an operation fails; also returns how many operations it began."""
    with mmap.mmap(-1, 8) as shared, memoryview(shared) as raw, raw.cast("Q") as count:

        def install() -> None:
            failing.install(count)

        return bench.run(name, place, install=install), count[0]


def points(bench: Bench, scratch: Path, chosen: argparse.Namespace) -> Iterator[Point]:
    if "disk" in chosen.limits:
        yield from disk_points(bench, scratch, chosen.steps)
    if "file-size" in chosen.limits:
        yield from file_size_points(bench, scratch, chosen.steps)
    if "address-space" in chosen.limits:
        yield from address_space_points(bench, scratch, chosen.steps)
    if "read-only" in chosen.limits:
        yield from read_only_points(bench, scratch)
    if "operations" in chosen.limits:
        yield from operation_points(bench, scratch, chosen.every, chosen.in_turn)


LIMITS = ("disk", "file-size", "address-space", "read-only", "operations")
OUTCOMES = ("refused", "finished", "lost")


def run(chosen: argparse.Namespace) -> list[Point]:
    """Tries all points; prints those that are lost at once."""
    with scratch_and_world("limits", chosen.world) as (root, world):
        scratch = root / "scratch"
        scratch.mkdir()
        bench = Bench(world, planted=chosen.planted)
        if chosen.commands is not None:
            bench.tried = [name for name in bench.tried if name in chosen.commands]
        if any(name.startswith("train") for name in bench.tried):
            bench.learn(scratch)
        found = []
        for point in points(bench, scratch, chosen):
            found.append(point)
            if point.outcome == "lost":
                print(json.dumps(vars(point)), file=sys.stderr, flush=True)
    return found


def summary(found: list[Point]) -> dict[str, Any]:
    return {
        **counted(found, OUTCOMES),
        "by_limit": counted_by(found, lambda point: point.limit, OUTCOMES),
        "by_command": counted_by(found, lambda point: point.command, OUTCOMES),
        "messages": dict(Counter(point.why for point in found if point.outcome == "refused").most_common(40)),
        "lost_points": [vars(point) for point in found if point.outcome == "lost"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="values of each limit (default: 12)")
    parser.add_argument("--every", type=int, default=1, help="file operations from one that fails to the next")
    parser.add_argument("--in-turn", action="store_true", help="an operation fails in one way, not in all three")
    parser.add_argument("--limits", default=",".join(LIMITS), help=f"some of {','.join(LIMITS)}")
    parser.add_argument("--commands", help="names, separated by commas; all by default")
    parser.add_argument("--world", type=Path, help="made by world.py; by default a new one")
    parser.add_argument("--planted", action="store_true", help="commands remove no file: points must be lost")
    parser.add_argument("--output", type=Path, help="where the summary goes as JSON")
    chosen = parser.parse_args()
    chosen.limits = set(chosen.limits.split(","))
    chosen.commands = set(chosen.commands.split(",")) if chosen.commands else None
    started = time.perf_counter()
    found = run(chosen)
    return finish({"seconds": round(time.perf_counter() - started), **summary(found)}, chosen.output)


if __name__ == "__main__":
    sys.exit(main())
