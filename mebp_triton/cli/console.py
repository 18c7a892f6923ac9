"""What a command prints: messages and progress to standard error, its answer to standard output."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mebp_triton.system.units import MIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@functools.cache
def console() -> Console:
    """The console on standard error. It is shared, so that messages appear above a progress bar, not in it."""
    from rich.console import Console

    return Console(stderr=True)


def say(message: str) -> None:
    """Prints ``message`` on standard error as it is, and in one line however narrow the terminal is."""
    console().print(message, highlight=False, markup=False, soft_wrap=True)


def silence_transformers() -> None:
    """Keeps transformers' log lines and progress bars out of the command's output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """Yields ``update(done, total, note="", task=description)``; every task has a bar of its own.

    Nothing is shown before the first update. A bar that a user's mistake ended is removed.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=console())
    tasks: dict[str, Any] = {}

    def update(done: int, total: int, note: str = "", task: str = description) -> None:
        if task not in tasks:
            bar.start()
            tasks[task] = bar.add_task(task, total=total, note=note)
        bar.update(tasks[task], completed=done, total=total, note=note)

    finish = bar.stop
    try:
        yield update
    except ValueError:
        bar.live.transient = True
        finish = bar.live.stop
        raise
    finally:
        if tasks:
            finish()


def answer(arguments: argparse.Namespace, value: dict[str, Any], table: Table) -> None:
    """Prints the command's result: ``value`` as JSON with ``--json``, else ``table``."""
    if arguments.json:
        print(json.dumps(value, indent=2))
    else:
        from rich.console import Console

        Console().print(table)


def two_columns(title: str, rows: dict[str, Any]) -> Table:
    """A table with a row per entry: its name and its value."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def readable(summary: dict[str, Any]) -> dict[str, str]:
    """Rows for ``two_columns``: names in words, bytes in MiB, and no row for None."""
    rows = {}
    for name, value in summary.items():
        if value is None:
            continue
        if name.endswith("_bytes"):
            rows[name.removesuffix("_bytes").replace("_", " ")] = f"{value / MIB:.1f} MiB"
        else:
            rows[name.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return rows
