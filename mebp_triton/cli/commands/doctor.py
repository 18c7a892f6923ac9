"""``mebp doctor``: what this machine has, what is missing, and whether its gradients are right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mebp_triton.cli.console import answer, two_columns
from mebp_triton.cli.doctor.findings import examine
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.system.errors import RunError
from mebp_triton.system.machine import resolve_device
from mebp_triton.training import gradient_check


def run(arguments: argparse.Namespace) -> None:
    if arguments.gradients:
        _gradients(arguments)
        return
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


def _gradients(arguments: argparse.Namespace) -> None:
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
