"""``mebp quantize``: makes a store from a model."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mebp_triton.cli.console import answer, progress_bar, say
from mebp_triton.cli.flags import add_calibration, add_quantization, asked_form
from mebp_triton.cli.source_texts import SourceTexts, as_values, describe, describe_calibration
from mebp_triton.convert.calibration import CALIBRATION_WINDOWS
from mebp_triton.system.units import MIB

if TYPE_CHECKING:
    from rich.table import Table

    from mebp_triton.convert.quantize import QuantizeReport
    from mebp_triton.kernels.names import Form


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model directory (safetensors; in 4 bits too) or .gguf file")
    parser.add_argument("store", metavar="OUT", help="the store directory to make")
    add_quantization(parser)
    parser.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="B",
        help="mean bits of the linear layers of a 16-bit model, scales counted, in place of --bits: layers whose "
        "rounding harms most get 8 bits, the others 4",
    )
    add_calibration(parser)


def run(arguments: argparse.Namespace) -> None:
    texts = SourceTexts(arguments)
    store = Path(arguments.store)
    report = quantize_with_progress(arguments.source, store, arguments, texts=texts)
    evaluations = texts.evaluations(arguments.source, store)
    value = {
        "store": arguments.store,
        "matrices": len(report.errors),
        "taken_over": len(report.taken_over),
        "decoded": Counter(report.decoded.values()),
        "schemes": sorted({form.scheme for form in report.forms.values()}),
        "bits": sorted({form.bits for form in report.forms.values()}),
        "bits_per_weight": {"linear": report.bits_per_weight(report.linear), "all": report.bits_per_weight()},
        "int4_bytes": report.int4_bytes,
        "float_bytes": report.float_bytes,
        "kept_float": {reason: dataclasses.asdict(count) for reason, count in report.kept_float.items()},
        "relative_error_worst": max(report.errors.values()),
        "relative_error": report.errors,
        "compensated": len(report.compensated),
        "weighted": report.weighted,
        "unseen": report.unseen,
        **as_values(evaluations),
    }
    table = _table(arguments.store, report)
    table.caption = describe(evaluations) if evaluations else None
    answer(arguments, value, table)


def quantize_with_progress(
    source: str,
    store: Path,
    arguments: argparse.Namespace,
    announcement: str = "",
    texts: SourceTexts | None = None,
) -> QuantizeReport:
    """Makes ``store`` from ``source`` as the quantization flags say, under a progress bar.

    ``announcement``: a line that is said once the source has turned out to be one. ``texts``: those of
    ``flags.add_calibration``; None for a command without them.
    """
    from mebp_triton.convert.quantize import quantize
    from mebp_triton.models.kept_float import describe_kept_float

    left = [announcement] if announcement else []
    with progress_bar("quantizing") as update:

        def progress(done: int, total: int) -> None:
            if left:
                say(left.pop())
            update(done, total)

        report = quantize(
            source,
            store,
            **asked_form(arguments),
            scale_search=arguments.scale_search,
            bits_per_weight=getattr(arguments, "bits_per_weight", None),
            progress=progress,
            calibration=lambda companions: None if texts is None else texts.read(companions),
            calibration_windows=getattr(arguments, "calibration_windows", CALIBRATION_WINDOWS),
        )
    if report.taken_over:
        say(f"{_count(report, report.taken_over)} were taken over bit for bit")
    floats = report.errors.keys() - report.taken_over - report.decoded.keys()
    if floats and (report.taken_over or report.decoded):
        count, worst = _count(report, floats), _worst(report, floats)
        say(f"{count} are floats in {source} and were rounded to int4: {worst}")
    for codes in sorted(set(report.decoded.values())):
        names = {name for name, kind in report.decoded.items() if kind == codes}
        bits = " and ".join(map(str, sorted({report.forms[name].bits for name in names})))
        loss = f"decoded and rounded to {bits} bits: {_worst(report, names)}"
        say(f"{_count(report, names)} are {codes} in {source}, {loss}")
    for line in describe_calibration(report):
        say(line)
    for line in describe_kept_float(report.kept_float, report.int4_bytes + report.float_bytes):
        say(line)
    return report


def _count(report: QuantizeReport, names: Collection[str]) -> str:
    return f"{len(names)} of {len(report.errors)} matrices"


def _worst(report: QuantizeReport, names: Collection[str]) -> str:
    return f"relative error up to {max(report.errors[name] for name in names):.3f}"


def _table(store: str, report: QuantizeReport) -> Table:
    """A row per kind of layer and form, such as q_proj with 4 bits, and the mean bits of a weight at the end."""
    from rich.table import Table

    table = Table(title_justify="left")
    table.title = f"{store}: {report.int4_bytes / MIB:.1f} MiB int4; relative errors, their median and the worst"
    # In 80 columns each row is one line.
    for heading in ("layer", "matrices", "form", "bits a weight", "error", "worst"):
        table.add_column(heading, no_wrap=heading in ("layer", "form"))
    kinds: dict[str, dict[Form, list[str]]] = {}
    for name, form in report.forms.items():
        kinds.setdefault(name.rpartition(".")[2], {}).setdefault(form, []).append(name)

    def add(layer: str, form: str, names: Collection[str]) -> None:
        errors, bits = [report.errors[name] for name in names], report.bits_per_weight(names)
        median, worst = statistics.median(errors), max(errors)
        table.add_row(layer, str(len(names)), form, f"{bits:.3f}", f"{median:.4f}", f"{worst:.4f}")

    for kind, forms in kinds.items():
        for form, names in sorted(forms.items()):
            add(kind, f"{form.bits} bits, {form.scheme}, {form.group_size}", names)
    table.add_section()
    add("all linear", "", report.linear)
    add("all", "", report.forms)
    return table
