"""Executes every shipped configuration as compiled, for each kind of weight, and random problems; judges all of them.

    python bench/compiled.py --output bench/results/compiled.json [--processes 2] [--part shipped] [--most 200]

The emulator runs the PTX that the compiler makes for each target (``autotune/emulator/``); no GPU is needed. Part
``shipped`` launches each configuration of the tables of sm_80 to sm_90 on small problems with two tiles each way: in
bfloat16 and float16, all schemes and group sizes, with and without LoRA, one weight and several; one half of these with
sizes as a model's layers have them, the other with ragged sizes and views. Part ``random`` mixes everything, and
parts ``small`` and ``experts`` likewise for the kernels without int4 weights and for products over experts. Where the
PTX of two targets is the same up to its target, it is executed once and counted for both.

Each result is kept in a file of progress as it comes, so a run that was ended goes on where it was; results of other
sources are thrown away. The exit code is 1 if any launch failed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from kernel_table import configurations
from machine import ROOT, git

from mebp_triton.autotune.cases import CASE_KERNELS, LAYOUTS, STYLES, Case, tile_case, tile_name
from mebp_triton.autotune.correctness import ALL_OPERATIONS, Prepared, prepare
from mebp_triton.autotune.emulator.driver import Emulator
from mebp_triton.autotune.emulator.faults import Fault, NotModelled
from mebp_triton.autotune.emulator.state import no_blocks
from mebp_triton.autotune.small_operations import OPERATIONS
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.names import FORMS, GROUP_SIZES, SCHEMES, Form
from mebp_triton.system import strict_json
from mebp_triton.system.machine import environment

TARGETS = (80, 86, 87, 89, 90)
# Of random problems: each family of instructions.
RANDOM_TARGETS = (75, 80, 87, 90, 120)
RANDOM_CASES, SMALL_CASES, EXPERT_CASES = 1000, 200, 200
FOUR_BITS, EIGHT_BITS = ([form for form in FORMS if form.bits == bits] for bits in (4, 8))
PARTS = ("shipped", "random", "small", "experts")
# What decides over a result, besides the compiler.
SOURCES = (
    "kernels/*.py",
    "kernels/tables/sm_[89]?.json",
    "autotune/emulator/*.py",
    "autotune/cases.py",
    "autotune/correctness.py",
    "autotune/expert_cases.py",
    "autotune/small_operations.py",
    "bench/compiled.py",
)


@dataclass(frozen=True)
class Unit:
    """A case, the targets that it is to be compiled for, and the shipped configuration that it is for."""

    case: Case
    targets: tuple[int, ...]
    configuration: str = ""


def shipped_units() -> list[Unit]:
    """Each configuration of the tables with every kind of weight and launch, for all targets that ship it."""
    taken: dict[tuple[Any, TileConfig], list[int]] = {}
    for target in TARGETS:
        for kernel, config in configurations(target):
            taken.setdefault((kernel, config), []).append(target)
    kinds = list(product((torch.bfloat16, torch.float16), SCHEMES, GROUP_SIZES, (True, False), (True, False)))
    units = []
    for (kernel, config), targets in sorted(taken.items(), key=str):
        for number, (dtype, scheme, group_size, lora, grouped) in enumerate(kinds):
            aligned = lora is not grouped
            case = tile_case(
                kernel,
                config,
                aligned,
                members=2 + number // 4 % 2 if grouped else 1,
                scheme=scheme,
                group_size=group_size,
                dtype=dtype,
                rank=(16 if aligned else 5) if lora else 0,
                bias=lora and kernel == "matmul",
                layout="contiguous" if aligned else "padded",
                seed=number,
            )
            units.append(Unit(case, tuple(targets), f"{kernel} {tile_name(config)}"))
    return units


def random_units() -> list[Unit]:
    """Problems of all kernels of int4 weights with everything mixed, products most of all; each for one target."""
    pick = random.Random(0)
    kernels = (
        ["matmul"] * 5 + ["matmul_dx"] * 5 + [kernel for kernel in CASE_KERNELS[2:] if kernel not in ALL_OPERATIONS]
    )
    units = []
    while len(units) < RANDOM_CASES:
        kernel = pick.choice(kernels)
        form = pick.choice(FOUR_BITS) if pick.random() < 0.75 else pick.choice(EIGHT_BITS)
        case = Case(
            kernel,
            None,
            pick.choice((1, 5, 16, 17, 33, 70)),
            tuple(pick.choice((1, 16, 34, 67, 130, 128)) for _ in range(pick.choice((1, 1, 2, 3)))),
            pick.choice((1, 40, 64, 97, 192, 208, 320, 393)),
            form.scheme,
            form.group_size,
            pick.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
            pick.choice((torch.float16, torch.float16, torch.float32, torch.int8)),
            pick.choice((0, 0, 1, 4, 16, 33, 40)),
            pick.random() < 0.5,
            pick.choice((2, 4, 8)),
            pick.choice(LAYOUTS),
            form.bits,
            len(units),
        )
        case = tamed(case, pick)
        # The assembler refuses bfloat16 for sm_75, where panels take the kernels' place.
        targets = [target for target in RANDOM_TARGETS if target > 75 or case.dtype != torch.bfloat16]
        units.append(Unit(case, (pick.choice(targets),)))
    return units


def small_units() -> list[Unit]:
    """Problems of the kernels without int4 weights, with everything mixed; each for one target."""
    pick, units = random.Random(0), []
    for number in range(SMALL_CASES):
        kernel = list(OPERATIONS)[number % len(OPERATIONS)]
        case = Case(
            kernel,
            None,
            pick.choice((1, 5, 16, 33, 70, 200)),
            tuple(pick.choice((1, 7, 16, 34, 130)) for _ in range(3 if kernel == "lora_gradients" else 2)),
            pick.choice((54, 64, 128, 300)),
            dtype=pick.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
            rank=pick.choice((0, 32) if kernel == "rope" else (1, 5, 16, 40, 70)),
            bias=pick.random() < 0.5,
            split=pick.choice((1, 3)),
            layout=pick.choice(LAYOUTS),
            style=pick.choice(STYLES.get(kernel, ("",))),
            seed=number,
        )
        units.append(Unit(case, (pick.choice(RANDOM_TARGETS[case.dtype == torch.bfloat16 :]),)))
    return units


def expert_units() -> list[Unit]:
    """Products over experts, with everything mixed; each for one target."""
    pick, units = random.Random(0), []
    for number in range(EXPERT_CASES):
        form = pick.choice(FOUR_BITS) if pick.random() < 0.75 else pick.choice(EIGHT_BITS)
        case = Case(
            pick.choice(("matmul", "matmul_dx")),
            None,
            k=pick.choice((1, 40, 64, 97, 192, 208, 320, 393)),
            scheme=form.scheme,
            group_size=form.group_size,
            dtype=pick.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
            scale_dtype=pick.choice((torch.float16, torch.float16, torch.float32, torch.int8)),
            rank=pick.choice((0, 0, 1, 4, 16, 33, 40)),
            layout=pick.choice(LAYOUTS),
            bits=form.bits,
            seed=number,
        )
        case = tamed(case, pick)
        case = replace(
            case,
            kernel="expert_matmul" if case.kernel == "matmul" else "expert_matmul_dx",
            config=None if case.config is None else replace(case.config, split=1),
            m=pick.choice((1, 16, 34, 67, 130, 128)),
            sizes=tuple(pick.choice((0, 1, 5, 16, 33, 70)) for _ in range(pick.choice((1, 2, 3, 8)))),
        )
        targets = [target for target in RANDOM_TARGETS if target > 75 or case.dtype != torch.bfloat16]
        units.append(Unit(case, (pick.choice(targets),)))
    return units


def tamed(case: Case, pick: random.Random) -> Case:
    """The case without what its kernel does not take; a product with a configuration."""
    if case.kernel in ("embedding", "decode"):
        return replace(case, sizes=case.sizes[:1], rank=0, bias=False, split=1)
    if case.kernel == "split_sums":
        return replace(case, rank=0, bias=False, layout="contiguous")
    if case.kernel == "softmax_tile":
        return replace(case, rank=0, split=1)
    block_n, block_k = pick.choice((16, 32, 64, 128)), pick.choice((64, 128))
    config = TileConfig(
        pick.choice((16, 32, 64)),
        block_n,
        block_k,
        # The assembly decodes four bytes of a thread. With fewer, it would compute with some that nobody has set.
        min(pick.choice((2, 4, 8)), block_n * block_k // 2 // (4 * 32)),
        pick.choice((1, 2, 3, 4)),
        pick.choice((1, 1, 2, 4)),
        weight_left=case.kernel == "matmul" or pick.random() < 0.5,
        scale_sums=case.kernel == "matmul" and pick.random() < 0.5,
    )
    case = replace(case, bias=case.bias and case.kernel == "matmul", split=1)
    if not config.suits(case.problem):
        config = replace(config, scale_sums=False)
    return case if pick.random() < 0.1 else replace(case, config=config)


@functools.cache
def units_of(part: str) -> list[Unit]:
    return {"shipped": shipped_units, "random": random_units, "small": small_units, "experts": expert_units}[part]()


def run_unit(part: str, number: int) -> dict[str, Any]:
    """Compiles one unit for its targets, executes each different PTX once, and judges the results."""
    unit, start = units_of(part)[number], time.process_time()
    row: dict[str, Any] = {"part": part, "number": number, "executed": [], "share": 0.0, "faults": []}
    prepared, faults = prepare(unit.case), dict[str, str | None]()
    for target in unit.targets:
        code = compiled(prepared, target)
        if code not in faults:
            row["executed"].append(target)
            try:
                with Emulator(target):
                    verdict = prepared.judge(prepared.launch())
                faults[code] = verdict.reason
                row["share"] = max(row["share"], verdict.share if verdict.ok else 0.0)
            except (Fault, NotModelled) as error:
                faults[code] = str(error)
        fault = faults[code]
        if fault is not None:
            row["faults"].append({"case": str(unit.case), "seed": unit.case.seed, "target": target, "fault": fault})
    return row | {"seconds": round(time.process_time() - start, 3)}


def compiled(prepared: Prepared, target: int) -> str:
    """The code of a case's launches for a target."""
    with Emulator(target, blocks=no_blocks) as emulator:
        prepared.launch()
    return "".join(launch.compiled.code for launch in emulator.launches)


# --- progress and results -------------------------------------------------------------------------------------------


def sources() -> str:
    """A hash of all that decides over a result."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Progress:
    """Results of units in a file, one line each, below a line that names the sources."""

    def __init__(self, path: Path) -> None:
        self.path, head = path, json.dumps({"sources": sources()})
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line of a run that was killed may be a part of one.
        kept = [line for line in lines[1:] if line.endswith("}")] if lines[:1] == [head] else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([head, *kept]) + "\n")
        rows = map(json.loads, kept)
        self.rows = {(row["part"], row["number"]): row for row in rows}

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["part"], row["number"]] = row


def start_worker(cache: str) -> None:
    """Prepares a process: one thread, and a place for what the compiler keeps. It ends when this script is killed."""
    torch.set_num_threads(1)
    os.environ["TRITON_CACHE_DIR"] = cache
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run(wanted: Iterable[tuple[str, int]], progress: Progress, processes: int) -> None:
    """Runs the units that have no result yet."""
    todo = [key for key in wanted if key not in progress.rows]
    print(f"{len(todo)} units to run", flush=True)
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    # Kernels are compiled anew, and what the compiler keeps of each (2 GB of them all) goes away.
    with TemporaryDirectory() as cache, ProcessPoolExecutor(processes, spawn, start_worker, (cache,)) as pool:
        futures = [pool.submit(run_unit, *key) for key in todo]
        for number, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            progress.add(row)
            for fault in row["faults"]:
                print(f"sm_{fault['target']}: {fault['case']}: {fault['fault']}", flush=True)
            if number % 50 == 0 or number == len(todo):
                print(f"{number} of {len(todo)} in {time.perf_counter() - start:.0f} s", flush=True)


Rows = list[tuple[Unit, dict[str, Any]]]


def counts(rows: Rows, targets: Iterable[int] | None = None) -> dict[str, Any]:
    """Launches of the units, for some targets or for all; how many were executed and wrong; and the worst error."""
    launches = [(row, target) for unit, row in rows for target in unit.targets if targets is None or target in targets]
    faulty = [(row, target) for row, target in launches if target in {fault["target"] for fault in row["faults"]}]
    return {
        "launched": len(launches),
        "executed": sum(target in row["executed"] for row, target in launches),
        "wrong": len(faulty),
        "worst_share": round(max((row["share"] for row, _ in launches), default=0.0), 4),
    }


def grouped(rows: Rows, key: Callable[[Unit], str]) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for unit, row in rows:
        groups.setdefault(key(unit), []).append((unit, row))
    return dict(sorted(groups.items()))


KINDS: dict[str, Callable[[Unit], str]] = {
    "kernel": lambda unit: unit.case.kernel,
    "dtype": lambda unit: str(unit.case.dtype).removeprefix("torch."),
    "weights": lambda unit: str(Form(unit.case.scheme, unit.case.group_size, unit.case.bits)),
    "members": lambda unit: str(len(unit.case.sizes)),
    "lora": lambda unit: "with" if unit.case.rank else "without",
}


def summary(part: str, rows: Rows) -> dict[str, Any]:
    """Counts of a part: of all, by target and by kind; and the faults themselves."""
    targets = sorted({target for unit, _ in rows for target in unit.targets})
    found = counts(rows) | {"processor_seconds": round(sum(row["seconds"] for _, row in rows), 1)}
    found["by_target"] = {f"sm_{target}": counts(rows, [target]) for target in targets}
    for name, key in KINDS.items():
        found[f"by_{name}"] = {group: counts(some) for group, some in grouped(rows, key).items()}
    if part == "shipped":
        found["by_configuration"] = {
            name: {"targets": list(some[0][0].targets)} | counts(some)
            for name, some in grouped(rows, lambda unit: unit.configuration).items()
        }
    return found | {"faults": [fault for _, row in rows for fault in row["faults"]]}


def spread(count: int, most: int | None) -> list[int]:
    """All numbers below ``count``, or ``most`` of them, evenly spread."""
    return list(range(count)) if most is None else sorted({index * count // most for index in range(min(most, count))})


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--most", type=int, help="only so many units of each part, evenly spread")
    parser.add_argument("--progress", type=Path, default=ROOT / "build" / "compiled.jsonl")
    chosen = parser.parse_args(words)
    parts = [part for part in PARTS if part in (chosen.part or PARTS)]
    wanted = [(part, number) for part in parts for number in spread(len(units_of(part)), chosen.most)]
    progress = Progress(chosen.progress)
    run(wanted, progress, chosen.processes)
    record: dict[str, Any] = {
        "commit": git("rev-parse", "HEAD"),
        "changed_files": bool(git("status", "--porcelain", "--untracked-files=no")),
        "sources": sources(),
        "processes": chosen.processes,
        **environment(),
    }
    for part in parts:
        rows = [(units_of(part)[number], progress.rows[part, number]) for of, number in wanted if of == part]
        record[part] = summary(part, rows)
    strict_json.write_json(chosen.output, record)
    wrong = sum(record[part]["wrong"] for part in parts)
    launched = {part: record[part]["launched"] for part in parts}
    print(f"{launched} launches, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
