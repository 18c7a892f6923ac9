"""``mebp doctor``: what this machine has, what is missing, and whether its gradients are right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer, two_columns
from mebp_triton.cli.flags import add_device

if TYPE_CHECKING:
    from rich.table import Table


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store", metavar="STORE", nargs="?", help="also time this store, and compare its size with the memory here"
    )
    parser.add_argument(
        "--scratch-directory",
        metavar="DIR",
        help="time storage here, where a run would keep files (default: the system's temporary directory)",
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="instead, compare kernels and gradients on this device with float64; takes a minute",
    )
    add_device(parser, use="for --gradients: ")


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.doctor.findings import examine

    if arguments.gradients:
        _check_gradients(arguments)
        return
    if arguments.device is not None or arguments.backend != "auto":
        raise ValueError("--device and --backend are for --gradients: add that, or leave them out")
    findings = examine(
        Path(arguments.store) if arguments.store else None,
        Path(arguments.scratch_directory) if arguments.scratch_directory else None,
    )
    hidden = ("advice", "scratch_in_memory", "scratch_on_card")
    rows = {
        name.replace("_", " "): value
        for name, value in findings.items()
        if name not in hidden and not name.endswith(("_bytes", "_bytes_per_second"))
    }
    answer(arguments, findings, two_columns("this machine", rows))
    if not arguments.json:
        from rich.console import Console

        for line in findings["advice"]:
            Console().print(f"- {line}", highlight=False, markup=False)


def _check_gradients(arguments: argparse.Namespace) -> None:
    import torch

    from mebp_triton.kernels.routing import resolve_backend
    from mebp_triton.system.errors import RunError
    from mebp_triton.system.machine import resolve_device
    from mebp_triton.training import gradient_check

    device = torch.device(resolve_device(arguments.device))
    backend = resolve_backend(arguments.backend, device)
    rows = gradient_check.run(device, arguments.backend)
    failed = [row for row in rows if row["ok"] is False]
    value = {"device": str(device), "backend": backend, "checks": rows, "failed": len(failed)}
    answer(arguments, value, _table(f"{device}, {backend}", rows))
    if failed:
        first = failed[0]
        raise RunError(
            f"{len(failed)} of {len(rows)} checks failed, first {first['what']} in {first['dtype']}: "
            "training here would be wrong; try --backend panel, and report it"
        )


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A row per check of ``gradient_check.run``."""
    from rich.table import Table

    table = Table(title=f"against float64: {title}", title_justify="left")
    for column in ("check", "dtype", "relative error", "result"):
        table.add_column(column)
    words = {True: "passed", False: "FAILED", None: "left out, no time"}
    for row in rows:
        error = row.get("relative")
        reason = f": {row['reason']}" if "reason" in row else ""
        cells = (row["what"], row["dtype"], "" if error is None else f"{error:.1e}", words[row["ok"]] + reason)
        table.add_row(*cells)
    return table
