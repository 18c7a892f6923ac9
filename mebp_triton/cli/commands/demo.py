"""``mebp demo``: the whole path on a real model."""

from __future__ import annotations

import argparse
from pathlib import Path

from mebp_triton.cli.console import answer, console


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.demonstration import demonstrate

    value, table = demonstrate(Path(arguments.output_dir), arguments.max_steps, arguments.compare, console)
    answer(arguments, value, table)
