"""``mebp quantize``: a model becomes a store."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.table import Table

from mebp_triton.cli.console import answer, progress_bar
from mebp_triton.convert.quantize import QuantizeReport, quantize
from mebp_triton.system.units import MIB


def quantize_with_progress(source: str, store: Path, arguments: argparse.Namespace) -> QuantizeReport:
    with progress_bar("quantizing") as update:
        return quantize(
            source,
            store,
            scheme=arguments.scheme,
            group_size=arguments.group_size,
            scale_search=arguments.scale_search,
            progress=update,
        )


def run(arguments: argparse.Namespace) -> None:
    report = quantize_with_progress(arguments.source, Path(arguments.store), arguments)
    value = {
        "store": arguments.store,
        "matrices": len(report.errors),
        "taken_over": len(report.taken_over),
        "schemes": sorted(set(report.schemes.values())),
        "int4_bytes": report.int4_bytes,
        "float_bytes": report.float_bytes,
        "relative_error_worst": max(report.errors.values()),
        "relative_error": report.errors,
    }
    table = Table(title=f"{arguments.store}: {report.int4_bytes / MIB:.1f} MiB int4", title_justify="left")
    for heading in ("layer", "matrices", "scheme", "relative error, median", "worst"):
        table.add_column(heading)
    kinds: dict[str, list[str]] = {}
    for name in report.errors:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for kind, names in kinds.items():
        errors = [report.errors[name] for name in names]
        schemes = ", ".join(sorted({report.schemes[name] for name in names}))
        median = statistics.median(errors)
        table.add_row(kind, str(len(names)), schemes, f"{median:.4f}", f"{max(errors):.4f}")
    answer(arguments, value, table)
