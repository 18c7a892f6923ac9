"""``mebp tune``: finds the fastest kernel configurations."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer, progress_bar, say
from mebp_triton.cli.flags import add_linear_form, add_plot, at_least_one, plot_path
from mebp_triton.kernels.names import FLOAT_NAMES

if TYPE_CHECKING:
    from rich.table import Table


def add_flags(parser: argparse.ArgumentParser) -> None:
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--store", metavar="DIR", help="tune for the layers of this store, its scheme and group size")
    shapes.add_argument(
        "--model", metavar="DIR_OR_CONFIG", help="tune for the layers of this model directory or config.json"
    )
    shapes.add_argument("--shapes", metavar="NxK,...", help="tune for weights of these sizes (out x in features)")
    parser.add_argument("--m", metavar="M,...", help="numbers of tokens (default: one for every bucket of the tables)")
    parser.add_argument(
        "--dtype", choices=FLOAT_NAMES, help="dtype of activations (default: bfloat16; float16 before sm_80)"
    )
    add_linear_form(parser, "the store's")
    parser.add_argument("--target", metavar="SM", help="architecture, such as sm_87 (default: this device's)")
    parser.add_argument(
        "--offline", action="store_true", help="compile, execute and rank for --target; measure nothing"
    )
    parser.add_argument(
        "--limit",
        type=at_least_one,
        metavar="N",
        help="candidates to measure (default: 8), or with --offline to keep (default: all)",
    )
    parser.add_argument("--output", metavar="FILE", help="the table to write (default: the user's own)")
    parser.add_argument("--report", action="store_true", help="show what was found before; tune nothing")
    add_plot(parser, "achieved bandwidth and rate")
    parser.add_argument("--force", action="store_true", help="tune again what was found before")


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.autotune import report
    from mebp_triton.autotune.results import Results
    from mebp_triton.kernels.tables import bucket, load_tables, user_table_path
    from mebp_triton.system import atomic, strict_json

    architecture = _architecture(arguments)
    path = Path(arguments.output) if arguments.output else user_table_path(architecture)
    if path.is_dir():
        raise ValueError(f"{path} is a directory: --output names the table's file")
    results = Results(path, architecture, strict_json.write_json)
    if not arguments.report:
        results.check()
    plot = plot_path(arguments)
    problems = _problems(arguments, architecture)
    tuned = [] if arguments.report else _tune(arguments, problems, results)
    log, table = results.log(), results.table()
    # A report without --output shows what a launch would find: the shipped table, and over it the user's own.
    reports_all = arguments.report and not arguments.output
    if reports_all:
        table = load_tables(architecture)
    if problems:
        # An entry stands in for other forms, so a report shows those of all forms, unless one is asked for.
        every_form = arguments.report and not any((arguments.scheme, arguments.group_size, arguments.bits))
        wanted = {_without_form(bucket(problem)) if every_form else bucket(problem) for problem in problems}
        table = {key: row for key, row in table.items() if (_without_form(key) if every_form else key) in wanted}
    if arguments.report and not table:
        raise ValueError(f"nothing was tuned for {architecture} yet, {path} has no such entry: run `mebp tune` first")
    rows = report.rows(table, log, report.nominal_ceilings(architecture))
    ceilings = report.ceilings_of(rows, log, report.nominal_ceilings(architecture))
    if plot is not None:
        with atomic.atomic_path(plot) as temporary:
            report.draw(rows, ceilings, f"int4 kernels on {architecture}", temporary)
    value = {
        "architecture": architecture,
        "table": str(path),
        "tuned": len(tuned),
        "ceilings": {name: dataclasses.asdict(ceiling) for name, ceiling in ceilings.items()},
        "rows": [row.to_json() for row in rows],
    }
    answer(arguments, value, _table(f"kernels on {architecture}" if reports_all else str(path), rows))


def _architecture(arguments: argparse.Namespace) -> str:
    """The architecture of --target, or of this machine's device.

    Raises:
        ValueError: there is none, or it cannot be tuned for here.
    """
    import torch

    from mebp_triton.autotune.compile import SHARED_LIMITS
    from mebp_triton.kernels.tables import architecture_of

    here = architecture_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else ""
    targets = [f"sm_{target}" for target in SHARED_LIMITS]
    if arguments.target is not None and arguments.target not in (*targets, here):
        raise ValueError(f"--target must be one of {', '.join(targets)}, got {arguments.target!r}")
    if arguments.report and (arguments.offline or arguments.force):
        raise ValueError("--report tunes nothing: leave out --offline and --force")
    if (arguments.offline or arguments.report) and (arguments.target or here):
        return arguments.target or here
    if arguments.offline or arguments.report:
        raise ValueError("there is no CUDA device here: name an architecture, such as --target sm_87")
    if not here:
        raise ValueError("there is no CUDA device here to measure on: use --offline --target sm_87 (or another one)")
    if arguments.target not in (None, here):
        raise ValueError(f"--target is {arguments.target}, and the device here is {here}: add --offline")
    return here


def _problems(arguments: argparse.Namespace, architecture: str) -> list[Any]:
    """A problem for every bucket of the layers asked for. Only with --report may there be none: it shows all then."""
    from mebp_triton.autotune import shapes
    from mebp_triton.autotune.tune import target_of
    from mebp_triton.cli.inference import model_config
    from mebp_triton.convert.recipe import Recipe
    from mebp_triton.kernels.names import DEFAULT_FORM
    from mebp_triton.kernels.tables import DTYPES, M_BUCKETS
    from mebp_triton.store.reader import Store

    dtype = DTYPES[arguments.dtype or ("bfloat16" if target_of(architecture) >= 80 else "float16")]
    tokens = shapes.parse_tokens(arguments.m) if arguments.m else M_BUCKETS
    recipe = Recipe(arguments.scheme, arguments.group_size, bits=arguments.bits)
    forms = [recipe.form(DEFAULT_FORM)]
    if arguments.shapes:
        pairs = shapes.parse_shapes(arguments.shapes)
    elif arguments.model:
        pairs = shapes.with_groups(_shared_inputs(model_config(Path(arguments.model))))
    elif arguments.store:
        store = Store(Path(arguments.store))
        pairs = shapes.with_groups(_shared_inputs(model_config(store.directory)))
        # The kernels of embedding and head are not tuned.
        forms = sorted({recipe.form(info.form) for info in store.block_matrices()})
    elif arguments.report:
        return []
    else:
        raise ValueError("say what to tune for: --store DIR, --model DIR_OR_CONFIG or --shapes NxK,...")
    return [
        problem
        for form in forms
        for problem in shapes.problems(pairs, tokens, form.scheme, form.group_size, dtype, form.bits)
    ]


def _without_form(problem: Any) -> Any:
    from mebp_triton.kernels.names import DEFAULT_FORM

    return dataclasses.replace(problem, **DEFAULT_FORM._asdict())


def _shared_inputs(config: Any) -> list[list[tuple[int, int]]]:
    """(N, K) of the decoder's linear layers. Layers that read the same input are in one list, since they run as one."""
    import torch

    from mebp_triton.models import discover
    from mebp_triton.models.skeleton import build_skeleton, int4_sites

    try:
        groups = discover.shared_inputs(config)
    except ValueError as error:
        say(f"{error}; each layer is tuned alone")
        model = build_skeleton(config, torch.float32, "eager")
        groups = [[site] for site in int4_sites(model)[0] if site.role == "linear"]
    return [[(site.out_features, site.in_features) for site in group] for group in groups]


def _tune(arguments: argparse.Namespace, problems: list[Any], results: Any) -> list[Any]:
    """Measures or ranks the candidates of each problem, and keeps what wins in ``results``."""
    import torch

    from mebp_triton.autotune import tune

    with progress_bar("ranking" if arguments.offline else "measuring") as update:

        def on_compilation(done: int, total: int) -> None:
            update(done, total, task="compiling")

        if arguments.offline:
            rank = tune.model_rank(results.architecture, arguments.limit, on_compilation, execute=True)
            return tune.tune_offline(problems, results, rank, arguments.force, update)
        machine = tune.Machine.of(torch.device("cuda", torch.cuda.current_device()))
        rank = tune.model_rank(results.architecture, None, on_compilation)
        return tune.tune(problems, machine, results, rank, arguments.limit or tune.LIMIT, arguments.force, update)


def _table(title: str, rows: list[Any]) -> Table:
    from rich.table import Table

    remarks = []
    if any(row.provenance == "static" for row in rows):
        remarks.append("* predicted, and compared with the data sheet: nothing was measured")
    if any(row.bound is not None for row in rows):
        remarks.append("bound: what takes longest in the model, in 1,000 clocks of the busiest multiprocessor")
    if any(row.bound is None for row in rows):
        remarks.append("no bound: shipped, or logged by an older version; `mebp tune --offline` ranks it here")
    notes = list(dict.fromkeys(row.note for row in rows if row.note is not None))
    if notes:
        remarks.append(f"+ {notes[0]}" + (f", and {len(notes) - 1} more: see --json" if len(notes) > 1 else ""))
    table = Table(title="\n".join([title, *remarks]), title_justify="left")
    headings = ("kernel", "M", "N x K", "route", "us", "GB/s (of copy)", "TFLOP/s (of matmul)", "bound", "next best")
    for heading in headings:
        table.add_column(heading, overflow="fold")

    def rate(value: float | None, share: float | None) -> str:
        return "" if value is None else f"{value:.3g}" + ("" if share is None else f" ({share:.0%})")

    for row in rows:
        lost = [f"{loss.route} {loss.slower_by:+.0%}" for loss in row.lost if loss.slower_by is not None]
        table.add_row(
            row.kernel,
            str(row.m),
            f"{row.n}x{row.k}",
            row.route + ("" if row.note is None else " +"),
            f"{row.time_us:.1f}" + ("*" if row.provenance == "static" else ""),
            rate(row.gb_s, row.of_copy),
            rate(row.tflop_s, row.of_matmul),
            "" if row.bound is None else f"{row.bound} {row.clocks[row.bound] / 1e3:.3g}",
            lost[0] if lost else "",
        )
    return table
