"""The command ``mebp``: runs one command, and turns what happens into messages and an exit code.

Exit codes: 0 success; 1 the run failed; 2 the user's mistake, with one line that says what to do; 130 and 143
interrupted by Ctrl-C and SIGTERM. Tracebacks are shown only with ``--debug``.

Nothing imported here imports torch: ``--help`` and a mistyped flag must be answered at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import resource
import signal
import sys
import warnings
from collections.abc import Sequence

from mebp_triton.system.signals import interrupting, reporting_lost_pages

from .console import silence_transformers
from .flags import with_flags
from .libraries import load_libraries
from .parser import build_parser

# Failures of the system that name a path which the user can mend.
PATH_MISTAKES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)

# Address space that importing torch needs, with the stacks of its threads; and what must remain once it is imported.
LIBRARIES_ADDRESS_SPACE, LEAST_ADDRESS_SPACE = 2 << 30, 64 << 20

WITH_LESS_MEMORY = {
    "train": "give --memory-budget, a smaller --max-length or --per-device-train-batch-size",
    "eval": "give a smaller --max-length",
    "generate": "give a shorter --prompt or a smaller --max-new-tokens",
}
HINTS = {"train": "; --resume goes on from the last checkpoint", "tune": "; the same command goes on"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mebp`` and returns the exit code.

    Args:
        argv: the arguments; by default those of the process, which then serves nothing but this command.

    Raises:
        SystemExit: after ``--help`` or ``--version``, and with code 2 for arguments that cannot be parsed.
    """
    try:
        check_address_space()
    except OSError as error:
        print(f"mebp: error: {error.strerror}", file=sys.stderr)
        return 1
    share_cores()
    arguments = argparse.Namespace(command="", debug=False)
    try:
        with interrupting():
            _print_any_text()
            build_parser().parse_args(argv, arguments)
            warnings.showwarning = lambda message, *_: print(f"mebp: warning: {message}", file=sys.stderr)
            with reporting_lost_pages():
                if argv is None:
                    load_libraries(arguments.command)
                silence_transformers()
                arguments.run(arguments)
        return 0
    except KeyboardInterrupt as interruption:
        print(f"mebp: {str(interruption) or 'interrupted' + HINTS.get(arguments.command, '')}", file=sys.stderr)
        return 128 + getattr(interruption, "number", signal.SIGINT)
    except BrokenPipeError:
        return 1
    except Exception as error:  # every failure becomes one line; --debug shows where it came from
        if arguments.debug:
            raise
        return report(error, arguments)


def _print_any_text() -> None:
    """Has standard output spell what its encoding lacks as escapes: an answer must not fail in an ASCII locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def report(error: Exception, arguments: argparse.Namespace) -> int:
    """Prints one line about ``error``; returns the exit code, 2 for the user's mistake and 1 for any other failure.

    ``arguments``: those of the command that failed; settings and ways out that the line names are flags of it.
    """
    from mebp_triton.system.errors import RunError
    from mebp_triton.system.foreign_errors import is_out_of_memory

    is_users = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in PATH_MISTAKES)
    # These say all there is to say. An OSError does when it names its file, as on a full disk.
    is_clear = is_users or isinstance(error, RunError) or (isinstance(error, OSError) and error.filename is not None)
    line = " ".join(str(error).split())
    if is_out_of_memory(error):
        is_clear, line = True, f"out of memory: {WITH_LESS_MEMORY.get(arguments.command, 'end other programs')}"
    elif not is_clear and not isinstance(error, OSError):
        line = f"{type(error).__name__}: {line}"
    elif is_users:
        line = with_flags(line, _settings(arguments))
    print(f"mebp: error: {line}{'' if is_clear else ' (--debug shows where)'}", file=sys.stderr)
    return 2 if is_users else 1


def _settings(arguments: argparse.Namespace) -> set[str]:
    """The settings of a command that are flags of it, and not arguments that are given without one."""
    from mebp_triton.training.settings import FACTS

    taken = FACTS.keys() if arguments.command in ("train", "plan") else set()
    return {*taken, *vars(arguments)} - {"run", "command", "store", "source", "output"}


def share_cores() -> None:
    """Lets OpenMP's threads sleep soon, instead of spinning, while they wait for each other. Call before torch loads.

    By default libgomp spins for milliseconds. With another busy process on as many cores as threads, the thread that
    spins keeps the one it waits for from running, and uses up the time that it would need itself. The count is about
    10 microseconds: most waits within a step are shorter, and the others cost little more by sleeping.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def check_address_space() -> None:
    """Raises OSError where ``ulimit -v`` leaves less address space than the libraries need.

    A tensor that finds no memory is an exception. But some libraries, and Python itself, end the process without a word
    when an allocation of a few bytes fails.
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
