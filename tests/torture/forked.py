"""Runs commands in forked children, under limits, and tells how they ended: what the torture scripts share.

A fork of a process that has imported everything starts in milliseconds, where a new interpreter takes seconds. The
child calls the function behind ``mebp``: it has the command's arguments, messages and exit codes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

MIB = 1 << 20
PREFIX = "mebp: error: "
TEMPORARY = ".mebp-tmp-"


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; None where a signal ended it.
        signal: the signal's name; "" where none did. "hang" where it was killed for taking too long.
        out, err: what it printed.
        peak: its highest resident set in bytes.
    """

    code: int | None
    signal: str
    out: str
    err: str
    peak: int
    seconds: float

    def lines(self) -> list[str]:
        """The error lines on standard error, without warnings and progress. A command that refuses prints one."""
        return [line for line in self.err.splitlines() if line.startswith(PREFIX)]

    def fault(self) -> str:
        """Why this is no clean end; "" where it is one: code 0, or 1 or 2 and one line that names the mistake."""
        if self.signal:
            return f"ended by {self.signal}"
        if self.code == 0:
            return ""
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:200]}"
        if self.code not in (1, 2):
            return f"exit code {self.code}: {self.err.strip()[-200:]}"
        if len(self.lines()) != 1:
            return f"{len(self.lines())} lines of error: {self.err.strip()[-300:]}"
        line = self.lines()[0]
        if self.code == 1 and "(--debug shows where)" in line:
            return f"unnamed: {line[:300]}"
        if len(line) > 2000:
            return f"a line of {len(line)} characters: {line[:200]}"
        return ""


def forked(work: Callable[[], int], before: Callable[[], None] | None = None, seconds: float = 60) -> Ended:
    """Runs ``work`` in a forked child and waits for its end.

    Args:
        work: its return value is the exit code.
        before: called in the child first; sets its limits.
        seconds: the child is killed after so long.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _run_child(work, before, out.fileno(), err.fileno())
        hung = not _ends_within(child, seconds)
        if hung:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        out.seek(0)
        err.seek(0)
        return Ended(
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal="hang" if hung else signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "",
            out=out.read().decode(errors="replace"),
            err=err.read().decode(errors="replace"),
            peak=usage.ru_maxrss * 1024,
            seconds=time.perf_counter() - started,
        )


def _ends_within(child: int, seconds: float) -> bool:
    handle = os.pidfd_open(child)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def _run_child(work: Callable[[], int], before: Callable[[], None] | None, out: int, err: int) -> Any:
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - open until the child ends
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if before is not None:
            before()
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a panic of a Rust library is no Exception
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(arguments: Sequence[object]) -> Callable[[], int]:
    """Returns a function for ``forked`` that runs ``mebp`` with these arguments."""

    def work() -> int:
        from mebp_triton.cli.main import main

        return main([str(argument) for argument in arguments])

    return work


def own_process(arguments: Sequence[object], *options: str) -> Callable[[], int]:
    """Returns a function for ``forked`` that runs ``mebp`` in a new interpreter, as a user starts it."""

    def work() -> int:
        os.execv(sys.executable, [sys.executable, *(options or ("-m", "mebp_triton.cli")), *map(str, arguments)])

    return work


def address_space(extra: int) -> Callable[[], None]:
    """Returns a ``before`` for ``forked``: at most ``extra`` bytes more address space than the process has by then."""

    def limit() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))

    return limit


def import_all() -> None:
    """Imports everything, so that no child has to. Children draw no plots: they take long, and nobody looks at them."""
    import everything  # noqa: F401

    from mebp_triton.training import run_directory

    run_directory.draw_plots = lambda *arguments: []


def rank_without_compiling() -> None:
    """Lets ``mebp tune`` rank two candidates by made-up times; compiling takes minutes, and is not what is tried."""
    from mebp_triton.autotune import tune
    from mebp_triton.autotune.log import Trial
    from mebp_triton.kernels.configs import Problem, TileConfig, default_config

    def rank(problem: Problem) -> list[Trial]:
        time.sleep(0.02)  # so that a random moment can fall in here
        return [Trial(default_config(problem), 5.0), Trial(TileConfig(16, 64, 64), 6.0)]

    tune.model_rank = lambda *arguments, **named: rank  # type: ignore[assignment]


def remove_nothing() -> None:
    """A planted fault: this process removes no file and no directory."""
    os.unlink = os.remove = os.rmdir = lambda *arguments, **options: None  # type: ignore[assignment]
