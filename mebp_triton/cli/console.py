"""What the commands share. Messages and progress go to standard error, answers to standard output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mebp_triton.system.units import MIB

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
console = Console(stderr=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """Yields ``update(done, total, note="", task=description)``; every task has a bar of its own.

    Nothing is shown before the first update, and nothing stays of a bar that a user's mistake ended.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=console)
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
    """The command's result: JSON where asked for, a table otherwise."""
    if arguments.json:
        print(json.dumps(value, indent=2))
    else:
        Console().print(table)


def two_columns(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def readable(summary: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, value in summary.items():
        if value is None:
            continue
        if name.endswith("_bytes"):
            rows[name.removesuffix("_bytes").replace("_", " ")] = f"{value / MIB:.1f} MiB"
        else:
            rows[name.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return rows
