"""Runs the command line in a forked child, under limits, and tells how it ended: what the torture scripts share.

A fork of a process that has imported everything starts in milliseconds, where a new interpreter takes seconds. The
child runs ``mebp_triton.cli.main``: the arguments, messages and exit codes of the command.
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

# Before anything starts a thread: a fork has only the thread that forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

MIB = 1 << 20
PREFIX = "mebp: error: "


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; None where a signal ended it.
        signal: the signal's name; "" where none did. "hang" where it was killed for taking too long.
        out, err: what it printed.
        peak: bytes of its highest resident set.
    """

    code: int | None
    signal: str
    out: str
    err: str
    peak: int
    seconds: float

    def lines(self) -> list[str]:
        """Standard error without warnings and progress: of a command that refuses, one line."""
        return [line for line in self.err.splitlines() if line.startswith(PREFIX)]

    def fault(self) -> str:
        """Why this is no clean end, "" where it is one: 0, or 1 or 2 with one line that names what is wrong."""
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
    """Runs ``work`` in a forked child; ``before`` sets its limits. Its return value is the exit code."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(work, before, out.fileno(), err.fileno())
        hung = not _ended_within(child, seconds)
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


def _ended_within(child: int, seconds: float) -> bool:
    handle = os.pidfd_open(child)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def _child(work: Callable[[], int], before: Callable[[], None] | None, out: int, err: int) -> Any:
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - of the child
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if before is not None:
            before()
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a panic of a Rust library is none of Exception
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(arguments: Sequence[object]) -> Callable[[], int]:
    """``mebp`` with these arguments, for ``forked``."""

    def work() -> int:
        from mebp_triton.cli.main import main

        return main([str(argument) for argument in arguments])

    return work


def address_space(extra: int) -> Callable[[], None]:
    """For ``forked``: at most ``extra`` bytes more than the process has now."""

    def limit() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))

    return limit


def import_all() -> None:
    """Imports everything that commands import while they run, so that no child has to.

    Plots are not drawn in the children: they take a second of each run, and nobody looks at them.
    """
    import importlib
    import pkgutil

    import torch

    import mebp_triton
    from mebp_triton.training import run_directory

    torch.set_num_threads(1)
    own = [module.name for module in pkgutil.walk_packages(mebp_triton.__path__, "mebp_triton.")]
    others = ["gguf", "datasets", "pyarrow.parquet", "matplotlib.figure", "transformers.modeling_gguf_pytorch_utils"]
    for name in [*own, *others, "transformers.models.llama.modeling_llama"]:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    run_directory.draw_plots = lambda *arguments: []
