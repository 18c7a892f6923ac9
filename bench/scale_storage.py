"""Prints, as markdown, what each storage of scales costs a kernel: float16, float32, or bytes with super scales.

    python bench/scale_storage.py [--target 87]
    python bench/scale_storage.py --panels

The first prints, for the configurations that most entries of a shipped table take, clocks of one trip of the main
loop, for one program on one multiprocessor: of the tensor cores at their nominal rate; then, for each storage, of
shared memory and of the schedulers, and the largest of the three as a multiple of that with float16. Each instruction
counts once. The conversions of bytes, whose number for one thread comes last, run in a unit of their own.

The second times products by panels on this CPU, with one thread, as multiples of that with float16. The storages take
turns, and each has the least of many times.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from kernel_table import configurations

from mebp_triton.autotune.cases import tile_name
from mebp_triton.autotune.compile import report
from mebp_triton.autotune.cost_model import NOMINAL, trip_clocks
from mebp_triton.autotune.execute import trip_counts
from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.configs import TUNED, Problem, TileConfig
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.panel import int4_matmul_dx_panel, int4_matmul_panel

FORMS = (Form("affine", 32), Form("codebook", 32), Form("symmetric", 16, 8))
STORAGES = {"float16": torch.float16, "float32": torch.float32, "two levels": torch.int8}
MOST = 3  # configurations of a kernel


def chosen(target: int, kernel: str) -> list[TileConfig]:
    """The configurations that take most entries, of those that suit every form."""
    taken = sorted(configurations(target).items(), key=lambda item: -len(item[1]))
    return [config for (name, config), _ in taken if name == kernel and not config.scale_sums][:MOST]


def row(target: int, problem: Problem, config: TileConfig) -> str:
    """The line of one configuration."""
    cells, first, tensor = [], None, 0.0
    for dtype in STORAGES.values():
        static = report(problem, config, target, scale_dtype=dtype)
        assert static.loop is not None and not static.spill_bytes
        counts = trip_counts(problem, config, target, scale_dtype=dtype)
        clocks = trip_clocks(config, replace(static, loop=replace(static.loop, conversions=0)), NOMINAL[target], counts)
        first, tensor = first or clocks.bound, clocks.tensor
        shared = clocks.wavefronts + clocks.operands
        conversions = f", {static.conversions}" if static.conversions else ""
        cells.append(f"{shared:.0f}, {clocks.issue:.0f}: {clocks.bound / first:.2f}{conversions}")
    return f"| {problem.kernel} {tile_name(config)} | {problem.form} | {tensor:.0f} | {' | '.join(cells)} |"


def panels(form: Form, tokens: int, size: int = 1024) -> str:
    """The line of products with a square matrix."""
    cpu, lines = torch.device("cpu"), []
    weights = [
        random_weight(size, size, cpu, form.scheme, form.group_size, dtype, bits=form.bits)
        for dtype in STORAGES.values()
    ]
    x = normal(tokens, size, dtype=torch.float32, device=cpu)
    for product in (int4_matmul_panel, int4_matmul_dx_panel):
        times = [[] for _ in weights]
        for _ in range(40 if tokens == 1 else 12):
            for weight, taken in zip(weights, times, strict=True):
                start = time.process_time()
                product(x, weight)
                taken.append(time.process_time() - start)
        lines.append(", ".join(f"{min(taken) / min(times[0]):.2f}" for taken in times[1:]))
    return f"| {form} | {tokens} | {' | '.join(lines)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=int, action="append", help="compute capability; may be repeated")
    parser.add_argument("--panels", action="store_true", help="time panels on this CPU")
    args = parser.parse_args()
    if args.panels:
        torch.set_num_threads(1)
        print("| form | tokens | matmul: float32, two levels | dX: float32, two levels |\n|---|---|---|---|")
        for form in FORMS:
            for tokens in (1, 256):
                print(panels(form, tokens), flush=True)
        return
    for target in args.target or (87, 90):
        print(f"\nsm_{target}\n\n| tile M x N x K | form | tensor cores | {' | '.join(STORAGES)} |")
        print("|---|---|---|" + "---|" * len(STORAGES))
        for kernel in TUNED:
            for config in chosen(target, kernel):
                for form in FORMS:
                    problem = Problem(kernel, 512, 4096, 4096, form.scheme, form.group_size, bits=form.bits)
                    print(row(target, problem, config), flush=True)


if __name__ == "__main__":
    main()
