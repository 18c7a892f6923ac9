"""Full disks and limits: a command that runs into one says so in one line, loses nothing, and leaves nothing.

    python tests/torture/limits.py --output bench/results/torture/limits.json

Each of quantize, train, train --resume, merge (to a model and to a store) and tune runs

- on a file system (tmpfs) with too little room, from none up to what it needs;
- under RLIMIT_FSIZE, from one byte up to its largest file;
- under RLIMIT_AS, from what the process has up to what it needs;
- into a directory that cannot be written, by mode (as another user) and by a read-only mount;
- with its n-th file operation failing (ENOSPC, EIO, a short write), for every n.

After each: exit code 0, or 1 or 2 with one line; no temporary file; no output, or a whole one; and where a checkpoint
was, one that resumes to the adapter of an uninterrupted run, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
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

sys.path.append(str(Path(__file__).resolve().parent))
from forked import MIB, Ended, command, forked, import_all  # noqa: E402
from results import counted, counted_by, finish  # noqa: E402
from world import TRAIN, copy_into, make_wide, make_world  # noqa: E402

TEMPORARY = ".mebp-tmp-"
NOBODY = 65534


@dataclass
class Point:
    """One try: the command, the limit, its value, and what came of it."""

    command: str
    limit: str
    value: str
    outcome: str = ""
    why: str = ""


class Bench:
    """The commands over one small world; ``place`` of each is where it writes."""

    def __init__(self, world: Path, model: Path | None = None, store: Path | None = None) -> None:
        self.world, self.is_wide = world, model is not None
        texts = [f"--train-file={world / 'data/train.txt'}"]
        adapter = world / ("wide-adapter" if self.is_wide else "adapter")
        model, store = model or world / "model", store or world / "store"
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
        """What lies there before: of ``train --resume``, the run that was interrupted."""
        if name == "train --resume":
            copy_into(self.world / "run", place / "out")
        if name == "tune":
            copy_into(self.world / "tables/sm_87.json", place / "sm_87.json")

    def run(self, name: str, place: Path, before: Callable[[], None] | None = None, after: Any = None) -> Ended:
        """In a child. ``after``: what is patched in it before the command starts."""
        arguments = self.arguments[name](place)
        start = command(arguments)

        def work() -> int:
            os.environ["TMPDIR"] = str(place)  # scratch files
            tempfile.tempdir = None
            few_candidates()
            if after is not None:
                after()
            return start()

        return forked(work, before, seconds=180)

    def own_process(self, name: str, place: Path, address_space: int) -> Ended:
        """As a user starts it, under a limit from the first instruction on."""
        arguments = [str(part) for part in self.arguments[name](place)]

        def start() -> int:
            os.execv(sys.executable, [sys.executable, "-m", "mebp_triton.cli", *arguments])

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, resource.RLIM_INFINITY))

        return forked(start, limit, seconds=300)

    def wide(self) -> Bench:
        """The same over a model of 100 MB, which does not fit into what a small process has left over."""
        wide = Bench(self.world, model=self.world / "wide-model", store=self.world / "wide-store")
        wide.tried = [name for name in self.tried if name not in ("quantize GGUF", "tune", "train --resume")]
        return wide

    def whole(self, name: str, place: Path, finished: bool) -> str:
        """What is wrong with what ``name`` left at ``place``, "" if nothing.

        Args:
            finished: it ended with exit code 0. If not, an absent output is fine.
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
        """Whether the run goes on from its checkpoint to the adapter that it would have had."""
        from mebp_triton.system import atomic

        if finished and not ((run / "checkpoint" / "state.json").exists() and (run / "run.json").exists()):
            return "finished without a checkpoint or results"
        if not (atomic.locate_directory(run / "checkpoint") / "state.json").exists():
            left = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()] if run.exists() else []
            known = {"metrics.jsonl", "evaluation_before.json"}
            return f"without a checkpoint, left {left}" if set(left) - known else ""
        ended = self.run("train --resume", run.parent)
        if ended.code != 0:
            return f"does not resume: {ended.err.strip()[-300:]}"
        if self.is_wide:  # a run of this model is not repeated for each point
            return ""
        adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = f"{hash_of(adapter)} {losses}"
        return "" if found == self.truth else "resumed to another result"

    def learn(self, scratch: Path) -> None:
        """What an uninterrupted run ends with."""
        place = Path(tempfile.mkdtemp(dir=scratch))
        ended = self.run("train", place)
        assert ended.code == 0, ended.err
        adapter = (place / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
        losses = [json.loads(line)["loss"] for line in (place / "out/metrics.jsonl").read_text().splitlines()]
        self.truth = f"{hash_of(adapter)} {losses}"

    def judge(self, point: Point, ended: Ended, place: Path) -> Point:
        if fault := ended.fault():
            point.outcome, point.why = "lost", fault
        elif wrong := self.whole(point.command, place, ended.code == 0):
            point.outcome, point.why = "lost", f"(exit code {ended.code}) {wrong}"
        elif ended.code == 0:
            point.outcome = "finished"
        else:
            point.outcome, point.why = "refused", ended.lines()[0].replace(str(place), "")[:200]
        return point


def hash_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def few_candidates() -> None:
    """Compiling takes minutes, and is not what is tried."""
    from mebp_triton.autotune import tune
    from mebp_triton.autotune.log import Trial
    from mebp_triton.kernels.configs import TileConfig, default_config

    def rank(*arguments: Any) -> Any:
        return lambda problem: [Trial(default_config(problem), 5.0), Trial(TileConfig(16, 64, 64), 6.0)]

    tune.model_rank = rank  # type: ignore[assignment]


# --- the limits -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes. OSError where none can be mounted."""
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
    for name in bench.tried:
        for step in range(steps):
            limit = max(1, 4**step)
            place = Path(tempfile.mkdtemp(dir=scratch))
            bench.prepare(name, place)

            def lower(limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            ended = bench.run(name, place, lower if limit > 4096 else _small(limit))
            yield bench.judge(Point(name, "RLIMIT_FSIZE", f"{limit} bytes"), ended, place)
            shutil.rmtree(place)


def _small(limit: int) -> Callable[[], None]:
    """Output is a file too: it is sent on through a pipe to a process without the limit."""

    def lower() -> None:
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
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return lower


def address_space_points(bench: Bench, scratch: Path, steps: int) -> Iterator[Point]:
    """From nothing above what the process has, in steps that double, up to 1 GiB; and of a process of its own."""
    bench = bench.wide()
    for name in bench.tried:
        for step in range(steps):
            extra = int(MIB * 2 ** (step * 10 / max(steps - 1, 1)))
            place = Path(tempfile.mkdtemp(dir=scratch))
            bench.prepare(name, place)

            def lower(extra: int = extra) -> None:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + extra
                resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

            ended = bench.run(name, place, lower)
            yield bench.judge(Point(name, "RLIMIT_AS", f"{extra // MIB} MiB more"), ended, place)
            shutil.rmtree(place)
    for size in (256, 512, 1024, 1536, 2048, 3072)[: max(steps // 2, 1)]:
        place = Path(tempfile.mkdtemp(dir=scratch))
        ended = bench.own_process("quantize", place, size * MIB)
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
    """Root may write anywhere."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


class Failing:
    """Makes the n-th of a process's file operations fail: what writes, allocates, makes, renames or syncs."""

    NAMED = ("open", "replace", "rename", "chmod", "mkdir")
    NAMES = (*NAMED, "write", "pwrite", "fsync", "posix_fallocate")

    def __init__(self, n: int, how: str) -> None:
        self.n, self.how, self.count = n, how, 0

    def install(self) -> None:
        from mebp_triton.system import atomic

        for name in self.NAMES:
            setattr(os, name, self._wrap(getattr(os, name), name))
        for owner, name in ((tempfile, "mkstemp"), (tempfile, "mkdtemp"), (tempfile, "TemporaryFile")):
            setattr(owner, name, self._wrap(getattr(owner, name), name))
        real = Path.write_bytes
        Path.write_bytes = self._wrap(real, "write_bytes")  # type: ignore[method-assign]
        atomic.open = self._open  # type: ignore[attr-defined]

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        """``files`` opens what it writes by ``open``: its writes are counted too."""
        file = open(path, mode, **options)  # noqa: SIM115 - the caller's
        if not set(mode) & set("wax+"):
            return file
        return _FailingFile(file, self)

    def _wrap(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & (os.O_WRONLY | os.O_RDWR)):
                return original(*arguments, **options)
            if self.falls_on_this(name):
                if self.how == "short":
                    self._half(original, name, arguments, options)
                named = arguments[:1] if name in self.NAMED else ()  # as the system's own errors
                raise OSError(*self.error(), *map(os.fspath, named))
            return original(*arguments, **options)

        return operation

    def falls_on_this(self, name: str) -> bool:
        self.count += 1
        return self.count == self.n

    def error(self) -> tuple[int, str]:
        code = errno.EIO if self.how == "EIO" else errno.ENOSPC
        return code, os.strerror(code)

    def _half(self, original: Callable[..., Any], name: str, arguments: Any, options: Any) -> None:
        """A write that stops in the middle, as on a disk that is full then."""
        if name in ("write", "pwrite"):
            original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
        if name == "write_bytes":
            original(arguments[0], arguments[1][: len(arguments[1]) // 2])


class _FailingFile:
    def __init__(self, file: Any, failing: Failing) -> None:
        self._file, self._failing = file, failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        if self._failing.falls_on_this("write"):
            if self._failing.how == "short":
                half = data if isinstance(data, str) else memoryview(data).cast("B")
                self._file.write(half[: len(half) // 2])
            raise OSError(*self._failing.error())
        return self._file.write(data)


def operation_points(bench: Bench, scratch: Path, every: int) -> Iterator[Point]:
    for name in bench.tried:
        for how in ("ENOSPC", "EIO", "short"):
            n, reached = 1, True
            while reached:
                place = Path(tempfile.mkdtemp(dir=scratch))
                bench.prepare(name, place)
                counted = place / "counted"
                failing = Failing(n, how)

                def after(failing: Failing = failing, counted: Path = counted) -> None:
                    failing.install()
                    real_exit = os._exit

                    def leave(code: int) -> None:
                        with open(counted, "w") as file:
                            file.write(str(failing.count))
                        real_exit(code)

                    os._exit = leave  # type: ignore[assignment]

                ended = bench.run(name, place, after=after)
                reached = int(counted.read_text()) >= n
                counted.unlink()
                if reached:
                    yield bench.judge(Point(name, f"operation fails: {how}", str(n)), ended, place)
                shutil.rmtree(place, ignore_errors=True)
                n += every


def points(bench: Bench, scratch: Path, steps: int, every: int, limits: set[str]) -> Iterator[Point]:
    if "disk" in limits:
        yield from disk_points(bench, scratch, steps)
    if "file-size" in limits:
        yield from file_size_points(bench, scratch, steps)
    if "address-space" in limits:
        yield from address_space_points(bench, scratch, steps)
    if "read-only" in limits:
        yield from read_only_points(bench, scratch)
    if "operations" in limits:
        yield from operation_points(bench, scratch, every)


LIMITS = ("disk", "file-size", "address-space", "read-only", "operations")
OUTCOMES = ("refused", "finished", "lost")


def run(steps: int, every: int, limits: set[str], commands: set[str] | None = None, show: bool = False) -> list[Point]:
    """All points of the limits; ``steps`` values of each, every ``every``-th file operation."""
    with tempfile.TemporaryDirectory(prefix="mebp-limits-") as name:
        root = Path(name)
        os.chmod(root, 0o755)
        import_all()
        (root / "world").mkdir()
        make_world(root / "world")
        if "address-space" in limits:
            make_wide(root / "world")
        scratch = root / "scratch"
        scratch.mkdir()
        bench = Bench(root / "world")
        bench.learn(scratch)
        if commands is not None:
            bench.tried = [name for name in bench.tried if name in commands]
        found = []
        for point in points(bench, scratch, steps, every, limits):
            found.append(point)
            if show and point.outcome == "lost":
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
    parser.add_argument("--steps", type=int, default=12, help="values of each limit")
    parser.add_argument("--every", type=int, default=1, help="file operations from one that fails to the next")
    parser.add_argument("--limits", default=",".join(LIMITS))
    parser.add_argument("--commands", help="names, separated by commas; all by default")
    parser.add_argument("--output", type=Path, help="the summary as JSON")
    arguments = parser.parse_args()
    started = time.perf_counter()
    commands = set(arguments.commands.split(",")) if arguments.commands else None
    found = run(arguments.steps, arguments.every, set(arguments.limits.split(",")), commands, show=True)
    value = {"seconds": round(time.perf_counter() - started), **summary(found)}
    return finish(value, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
