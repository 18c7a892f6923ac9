"""The command ``mebp``: parsing, messages and exit codes. What each command does lies in ``commands/``.

Exit codes: 0 done; 1 the run failed; 2 the user's mistake, one line that says what to do; 130 and 143 interrupted by
Ctrl-C and SIGTERM. A traceback only with ``--debug``.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import resource
import signal
import sys
import warnings
from collections.abc import Sequence

from mebp_triton.system.signals import interrupting, reporting_lost_pages

from .parser import build_parser

# A path that cannot be: the user's to mend.
PATH_MISTAKES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


# Of torch and all it loads, threads' stacks among it; and of what comes after that.
LIBRARIES_ADDRESS_SPACE, LEAST_ADDRESS_SPACE = 2 << 30, 64 << 20


def share_cores() -> None:
    """Lets OpenMP's threads wait for each other by sleeping, soon, and not by spinning. Before torch is imported.

    By default libgomp spins for milliseconds: beside one other busy process on as many cores as threads, the one that
    spins keeps the one it waits for from running, and a step takes 30 times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def check_address_space() -> None:
    """OSError where ``ulimit -v`` leaves less than the libraries take: they would end the process each in its own way.

    Some of them, and Python itself, do not get over a failed allocation of a few bytes; a tensor's is an exception.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    least = LEAST_ADDRESS_SPACE if "torch" in sys.modules else LIBRARIES_ADDRESS_SPACE
    if limit == resource.RLIM_INFINITY or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        left = limit - int(file.read().split()[0]) * resource.getpagesize()
    if left < least:
        raise OSError(
            errno.ENOMEM,
            f"the address space is limited to {limit >> 20} MiB, of which {max(left, 0) >> 20} are left and "
            f"{least >> 20} needed: raise it (ulimit -v), and limit memory by --memory-budget",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mebp``; returns the exit code."""
    try:
        check_address_space()
    except OSError as error:
        print(f"mebp: error: {error.strerror}", file=sys.stderr)
        return 1
    share_cores()
    arguments = argparse.Namespace(command="", debug=False)
    try:
        with interrupting():
            build_parser().parse_args(argv, arguments)
            warnings.showwarning = lambda message, *_: print(f"mebp: warning: {message}", file=sys.stderr)
            with reporting_lost_pages():
                importlib.import_module(f".commands.{arguments.command}", __package__).run(arguments)
        return 0
    except KeyboardInterrupt as interruption:
        hints = {"train": "; --resume goes on from the last checkpoint", "tune": "; the same command goes on"}
        line = str(interruption) or f"interrupted{hints.get(arguments.command, '')}"
        print(f"mebp: {line}", file=sys.stderr)
        return 128 + getattr(interruption, "number", signal.SIGINT)
    except BrokenPipeError:
        return 1
    except Exception as error:  # every failure becomes one line; --debug shows where it came from
        if arguments.debug:
            raise
        from mebp_triton.system.errors import RunError
        from mebp_triton.system.foreign_errors import is_out_of_memory

        users = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in PATH_MISTAKES)
        # What says all there is to say: a full disk, and what file it was, among them.
        known = users or isinstance(error, RunError) or (isinstance(error, OSError) and error.filename is not None)
        line = " ".join(str(error).split())
        if is_out_of_memory(error):
            known, line = True, "out of memory: give --memory-budget, shorter rows or a smaller batch"
        elif not known and not isinstance(error, OSError):
            line = f"{type(error).__name__}: {line}"
        print(f"mebp: error: {line}{'' if known else ' (--debug shows where)'}", file=sys.stderr)
        return 2 if users else 1


if __name__ == "__main__":
    sys.exit(main())
