"""Runs the code blocks of a page of the documents, in their order; ends with the first that fails.

    python tests/support/pages.py docs/tutorial.md

Every command and every block of Python runs in a fork of this process, which has imported what they need. Of the shell
this knows commands, and variables that take a command's output.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers  # noqa: F401

import mebp_triton.cli.main as command_line
import mebp_triton.models.load
import mebp_triton.training.trainer  # noqa: F401

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)


def run_page(page: Path) -> None:
    variables: dict[str, str] = {}
    blocks = BLOCK.findall(page.read_text())
    for language, text in blocks:
        if language == "python":
            run_forked(text, lambda text=text: run_python(text))
            continue
        for line in text.replace("\\\n", " ").splitlines():
            assigned = re.fullmatch(r"(\w+)=\$\((.*)\)", line.strip())
            output = run_line(assigned[2] if assigned else line, variables)
            if assigned:
                variables[assigned[1]] = output.strip()
    print(f"{len(blocks)} blocks ran")


def run_line(line: str, variables: dict[str, str]) -> str:
    """Runs one command of the shell; returns its output."""
    words = [re.sub(r"\$(\w+)", lambda name: variables[name[1]], word) for word in shlex.split(line)]
    if words[0] == "mebp":
        return run_forked(line, lambda: command_line.main(words[1:]))
    if words[:2] == ["python", "-c"]:
        return run_forked(line, lambda: run_python(words[2]))
    raise SystemExit(f"{line}\nneither mebp nor python -c")


def run_python(text: str) -> int:
    exec(compile(text, "<block>", "exec"), {"__name__": "__main__"})
    return 0


def run_forked(text: str, work: Callable[[], int]) -> str:
    """Runs ``work`` in a fork and returns its output; SystemExit if its exit code is not 0."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                code = work()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise SystemExit(f"{text}\nended with exit code {code}")
        out.seek(0)
        return out.read().decode()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_page(Path(sys.argv[1]))
