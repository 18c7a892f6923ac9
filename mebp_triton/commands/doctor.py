"""``mebp doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from .common import answer, two_columns


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.doctor import examine

    findings = examine(
        Path(arguments.store) if arguments.store else None,
        Path(arguments.scratch_directory) if arguments.scratch_directory else None,
    )
    hidden = ("advice", "scratch_in_memory", "scratch_on_card")
    rows = {
        name: value
        for name, value in findings.items()
        if name not in hidden and not name.endswith(("_bytes", "_bytes_per_second"))
    }
    table = two_columns("this machine", {key.replace("_", " "): value for key, value in rows.items()})
    answer(arguments, findings, table)
    if not arguments.json:
        for line in findings["advice"]:
            Console().print(f"- {line}", highlight=False)
