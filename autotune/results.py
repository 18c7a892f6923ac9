"""The files of the tuner's results: a table and its log, which are read, merged and written under a lock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from filelock import FileLock

from mebp_triton.kernels.tables import (
    Entry,
    Table,
    bucket,
    check_private,
    read_named_table,
    read_table,
    table_to_json,
    user_table_path,
)

from .ceilings import Ceilings
from .log import Log, Record, keep_measurements, log_path, read_log

LOCK_SECONDS = 60

# Writes a JSON value to a file, whole or not at all.
Save = Callable[[Path, Any], None]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}


def merge(table: Table, entry: Entry) -> Table:
    """``table`` with a newer entry. A prediction does not replace a measurement."""
    old = table.get(entry.problem)
    if old is not None and old.provenance == "measured" and entry.provenance == "static":
        return table
    return table | {entry.problem: entry}


class Results:
    """The table and the log of one architecture, in files that several processes may write at once.

    Args:
        path: the table's file; the log lies beside it.
        architecture: such as "sm_87".
        save: writes JSON atomically.
    """

    def __init__(self, path: Path, architecture: str, save: Save) -> None:
        self.path, self.architecture, self.save = path, architecture, save

    def check(self) -> None:
        """Raises ValueError, before any work is done, if results could not be kept in the files."""
        if self.path == user_table_path(self.architecture):
            if self.path.parent.exists():
                check_private(self.path.parent)
            return
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path.parent} is no directory: make it first, or choose another place")
        self.table()

    def table(self) -> Table:
        """The table so far.

        If the user's own table is damaged, it is ignored with a warning, and will be replaced. A damaged file that the
        user named is a ValueError, because it may be something else.
        """
        if self.path == user_table_path(self.architecture):
            return read_table(self.path, self.architecture)
        try:
            return read_named_table(self.path, self.architecture) if self.path.exists() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is there already and is no table of {self.architecture}: {error}") from None

    def log(self) -> Log:
        return read_log(log_path(self.path), self.architecture)

    def _lock(self) -> FileLock:
        # Nobody else may write there, because a launch believes what it finds.
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileLock(self.path.with_name(self.path.name + ".lock"), timeout=LOCK_SECONDS)

    def add(self, entry: Entry | None, record: Record) -> None:
        """Merges the results of one problem. ``entry`` is None if no route worked."""
        with self._lock():
            log = self.log()
            key = bucket(record.problem)
            log.records[key] = keep_measurements(log.records.get(key), record)
            self.save(log_path(self.path), log.to_json())
            if entry is not None:
                self.save(self.path, table_to_json(self.architecture, merge(self.table(), entry).values()))

    def add_ceilings(self, device: str, ceilings: Ceilings) -> None:
        """Merges the ceilings of one device; rates of other dtypes stay."""
        with self._lock():
            log = self.log()
            before = log.ceilings.get(device)
            rates = ceilings.tflop_s if before is None else before.tflop_s | ceilings.tflop_s
            log.ceilings[device] = Ceilings(ceilings.gb_s, rates)
            self.save(log_path(self.path), log.to_json())
