"""Turns committed result files into tables and plots.

    python bench/report.py bench/results/NAME.json ... --output docs/benchmarks-generated.md

It takes the files of ``gpu_suite.py`` and of ``products.py``; plots go beside the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from machine import unwritable
from matplotlib.figure import Figure

from mebp_triton.system import atomic
from mebp_triton.system.units import MIB

KERNELS = {"matmul": "forward, Y = X·Wᵀ", "matmul_dx": "backward, dX = dY·W"}


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return lines + [f"| {' | '.join(map(cell, row))} |" for row in rows] + [""]


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


class Page:
    """A page of Markdown, and the plots that belong to it.

    Attributes:
        output: the page's file; its stem begins the names of the plots.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.lines = output, ["# Measurements", ""]

    def plot(self, figure: Figure, name: str, text: str) -> None:
        path = self.output.with_name(f"{self.output.stem}-{name}.png")
        with atomic.atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        self.lines += [f"![{text}]({path.name})", ""]

    def write(self) -> None:
        atomic.write_bytes(self.output, ("\n".join(self.lines).rstrip() + "\n").encode())


def suite_page(page: Page, name: str, record: dict[str, Any]) -> None:
    """Writes a run of ``gpu_suite.py``; parts that are missing or broke off are named."""
    parts = record["parts"]
    environment = parts.get("environment", {}).get("results", {})
    page.lines += [f"## {environment.get('device', 'unknown device')} ({name}.json)", ""]
    if record["dry_run"]:
        page.lines += ["**A rehearsal at tiny sizes on a CPU: its times say nothing.**", ""]
    changed = " with uncommitted changes" if record["changed_files"] else ""
    page.lines += [f"{record['started']}, commit {record['commit']}{changed}.", ""]
    page.lines += table(
        ["part", "status", "seconds", "what went wrong"],
        [(part, found["status"], found["seconds"], found["error"]) for part, found in parts.items()],
    )
    sections = {
        "environment": _environment,
        "compile": _compile,
        "correctness": _correctness,
        "paged": _paged,
        "profile": _profile,
        "training": _training,
        "speed": _speed,
        "tune": _tune,
        "memory": _memory,
    }
    for part, section in sections.items():
        if parts.get(part, {}).get("results"):
            page.lines += [f"### {part.capitalize()}", ""]
            section(page, name, parts[part]["results"])


def _environment(page: Page, name: str, results: dict[str, Any]) -> None:
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    clocks = results.get("clocks_before") or {}
    page.lines += [f"{versions}. Driver {clocks.get('driver_version', 'none')}.", ""]
    rows = [("copy, GB/s (read and written)", *results.get("copy_gb_s", []))]
    rows += [(f"{dtype} matmul, TFLOP/s", *rates) for dtype, rates in results.get("matmul_tflop_s", {}).items()]
    page.lines += table(["measured ceiling", "first", "again"], [row for row in rows if len(row) == 3])


def _correctness(page: Page, name: str, results: dict[str, Any]) -> None:
    rows = []
    for section, cases in results.items():
        if section == "left_out":
            continue
        for dtype in dict.fromkeys(case["dtype"] for case in cases):
            mine = [case for case in cases if case["dtype"] == dtype]
            worst = max((case["relative"] for case in mine if case.get("relative") is not None), default=None)
            wrong = sum(not case["ok"] for case in mine)
            wide = sum(not case.get("narrow", case["ok"]) for case in mine)
            rows.append((section, dtype, len(mine), wrong, wide, worst))
    heads = ["what", "dtype", "cases", "beyond the rule", "beyond torch's error and a rounding", "worst relative error"]
    page.lines += table(heads, rows)
    _left_out(page, results)


def _compile(page: Page, name: str, results: dict[str, Any]) -> None:
    seconds = f" in {results['seconds']} s by {results['processes']} processes" if "seconds" in results else ""
    page.lines += [f"{results['compiled']} of {results['units']} launches compiled beforehand{seconds}.", ""]


def _paged(page: Page, name: str, results: dict[str, Any]) -> None:
    page.lines += ["Losses, gradients and parameters of three steps, compared with a resident run to the bit.", ""]
    heads = ["model", "weights", "checkpoints", "optimizer_state", "compared", "different"]
    page.lines += table(heads, [[row.get(head, "dense") for head in heads] for row in results["rows"]])
    _left_out(page, results)


def _profile(page: Page, name: str, results: dict[str, Any]) -> None:
    for side, reason in results["not_run"].items():
        page.lines += [f"Not run: {side}: {reason}", ""]
    heads = ["model", "tokens", "side", "launches", "step, s", "busy, s", "busy share"]
    keys = ["model", "sequence_length", "side", "launches", "step_seconds", "busy_seconds", "busy_share"]
    page.lines += table(heads, [[row[key] for key in keys] for row in results["rows"]])
    for row in results["rows"]:
        longest = [(item["name"], item["count"], item["us"]) for item in row["longest"][:10]]
        page.lines += [f"What takes longest in a step of {row['side']}, microseconds:", ""]
        page.lines += table(["kernel", "launches", "us"], longest)


def _memory(page: Page, name: str, results: dict[str, Any]) -> None:
    rows = [(row["scheme"], row["m"], f"{row['n']} x {row['k']}", row["extra_mib"]) for row in results["rows"]]
    page.lines += ["Forward and backward of one LoRA layer, peak beyond inputs and outputs.", ""]
    page.lines += table(["scheme", "M", "N x K", "MiB"], rows)


def _tune(page: Page, name: str, results: dict[str, Any]) -> None:
    page.lines += [f"{results.get('entries', 0)} entries measured: {results.get('table', 'no table')}.", ""]


def _speed(page: Page, name: str, results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if "median_us" in row]
    page.lines += [
        f"{results['dtype']}, median microseconds. `of cuBLAS`: its time over ours; above 1 we are faster.",
        "",
    ]
    for side, reason in results["not_run"].items():
        page.lines += [f"Not compared with {side}: {reason}", ""]
    if groups := [row for row in results["groups"] if "median_us" in row]:
        sides = list(groups[0]["median_us"])
        page.lines += ["#### Layers with one input and their adapters", ""]
        heads = ["N x K", "M", "pass", *sides, "of cuBLAS", "of bitsandbytes"]
        page.lines += table(heads, [_group_row(row, sides) for row in groups])
    for kernel, title in KERNELS.items():
        mine = sorted(
            (row for row in rows if row["kernel"] == kernel), key=lambda r: (-r["n"] * r["k"], r["n"], r["m"])
        )
        if not mine:
            continue
        sides = list(mine[0]["median_us"])
        heads = ["N x K", "M", *sides, "of cuBLAS", "of bitsandbytes", "GB/s", "TFLOP/s", "route"]
        page.lines += [f"#### {title}", ""]
        page.lines += table(heads, [_speed_row(row, sides) for row in mine])
        page.plot(_speed_figure(mine, title), f"{name}-{kernel}", f"{title}: speed against cuBLAS")
    _left_out(page, results)


def _group_row(row: dict[str, Any], sides: Sequence[str]) -> list[Any]:
    median = row["median_us"]
    return [
        ", ".join(f"{n} x {k}" for n, k in row["shapes"]),
        row["m"],
        "forward and gradients" if row["gradients"] else "forward",
        *(float(median[side]) for side in sides),
        median["cublas"] / median["ours"],
        median["bitsandbytes"] / median["ours_nf4"] if "bitsandbytes" in median else None,
    ]


def _speed_row(row: dict[str, Any], sides: Sequence[str]) -> list[Any]:
    median = row["median_us"]
    theirs = median["bitsandbytes"] / median["ours_nf4"] if "bitsandbytes" in median else None
    return [
        f"{row['n']} x {row['k']}",
        row["m"],
        *(float(median[side]) for side in sides),
        median["cublas"] / median["ours"],
        theirs,
        row["bytes_moved"] / median["ours"] / 1e3,
        row["flops"] / median["ours"] / 1e6,
        row["route"],
    ]


def _speed_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for shape in dict.fromkeys((row["n"], row["k"]) for row in rows):
        mine = [row for row in rows if (row["n"], row["k"]) == shape]
        ratios = [row["median_us"]["cublas"] / row["median_us"]["ours"] for row in mine]
        axes.plot([row["m"] for row in mine], ratios, marker="o", label=f"{shape[0]} x {shape[1]}")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="tokens", ylabel="cuBLAS' time / ours", title=title, ylim=(0, None))
    axes.legend()
    return figure


def _training(page: Page, name: str, results: dict[str, Any]) -> None:
    rows = sorted(results["rows"], key=lambda row: (row["model"], row["sequence_length"]))
    for side, reason in results["not_run"].items():
        page.lines += [f"Not run: {side}: {reason}", ""]
    heads = ["model", "tokens", "side", "tokens/s", "peak MiB", "reserved MiB", "first loss"]
    page.lines += table(heads, [_training_row(row) for row in rows])
    if any(row["peak_device_bytes"] is not None for row in rows):
        page.plot(_memory_figure(rows), f"{name}-training", "Peak memory of a step by sequence length")
    _left_out(page, results)


def _training_row(row: dict[str, Any]) -> list[Any]:
    peaks = [None if row[key] is None else row[key] / MIB for key in ("peak_device_bytes", "peak_reserved_bytes")]
    return [row["model"], row["sequence_length"], row["side"], row["tokens_per_second"], *peaks, row["losses"][0]]


def _memory_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for model, side in dict.fromkeys((row["model"], row["side"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["side"]) == (model, side)]
        peaks = [row["peak_device_bytes"] / MIB for row in mine]
        axes.plot([row["sequence_length"] for row in mine], peaks, marker="o", label=f"{model}, {side}")
    axes.set(xlabel="tokens", ylabel="MiB", title="Peak device memory of a step", ylim=(0, None))
    axes.legend(fontsize="small")
    return figure


def _left_out(page: Page, results: dict[str, Any]) -> None:
    for what, count in results.get("left_out", {}).items():
        page.lines += [f"Time did not last for {count} more of {what}.", ""]


def benchmark_page(page: Page, name: str, record: dict[str, Any]) -> None:
    """Writes ``pytest-benchmark``'s figures, with a row per problem and a column per side."""
    machine = record["machine_info"]
    page.lines += [f"## {machine['cpu']} ({name}.json)", ""]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    page.lines += [f"{record['datetime']}, commit {record['commit']}. {versions}.", ""]
    clock = f"{', '.join(record['timers'])}, {machine['threads']} thread(s)"
    page.lines += [f"Median milliseconds by {clock}.", ""]
    for group in dict.fromkeys(entry["group"] for entry in record["benchmarks"]):
        mine = [entry for entry in record["benchmarks"] if entry["group"] == group]
        sides = list(dict.fromkeys(entry["side"] for entry in mine))
        found: dict[str, dict[str, float]] = {}
        for entry in mine:
            found.setdefault(entry["problem"], {})[entry["side"]] = entry["median_seconds"] * 1e3
        page.lines += [f"### {group}", ""]
        rows = [[problem, *(times.get(side) for side in sides)] for problem, times in found.items()]
        page.lines += table(["problem", *sides], rows)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--output", type=Path, required=True, help="markdown file")
    arguments = parser.parse_args(given)
    if (problem := unwritable(arguments.output)) is not None:
        parser.error(f"--output cannot be written: {problem}")
    page = Page(arguments.output)
    for path in arguments.results:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{path} cannot be read: {error}")
        if "parts" in record:
            suite_page(page, path.stem, record)
        elif "benchmarks" in record:
            benchmark_page(page, path.stem, record)
        else:
            parser.error(f"{path} is no result of gpu_suite.py or of the pytest-benchmark suites")
    page.write()


if __name__ == "__main__":
    main()
