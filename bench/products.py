"""Times forward, dX, the LoRA layer and the loss on a CPU, in float32: ours, torch on the decoded weight, bitsandbytes.

    python bench/products.py --output bench/results/NAME.json
    python bench/kernel_table.py --results bench/results/NAME.json        # the ratios, as markdown

`ours` and `torch` have the same weight, and so have `ours_nf4` and `bitsandbytes`. `plain` and `plain_nf4` are ours
without compiled code; `bitsandbytes_scalar` is its way without AVX-512. All are checked against torch's product first.
The sides take turns, in reversed order every other round; every sample is the mean of the calls that fill a millisecond
after one that is not timed, so weights that fit into a cache are there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes_path
import torch
from gpu.operands import close, nf4_pair
from gpu.timed import SAME
from machine import commit, git, processor_facts
from torch import Tensor

from mebp_triton.kernels import native
from mebp_triton.kernels.accuracy import normal, random_weight
from mebp_triton.kernels.functions import int4_cross_entropy, int4_matmul, int4_matmul_dx
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_function import int4_lora_linear
from mebp_triton.system.machine import environment

SHAPES = ((1536, 576), (4864, 896), (896, 4864))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
HEAD, HEAD_TOKENS = (49152, 576), 256
RANK, SCALING = 16, 2.0
ROUNDS, SAMPLE_SECONDS = 9, 1e-3
CPU = torch.device("cpu")

Call = Callable[[], Any]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    """One way to compute something, and what holds while it does."""

    call: Call
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext

    def seconds(self, calls: int) -> float:
        """The mean of so many calls, after one that fills the caches which the side before has emptied."""
        with self.inside():
            self.call()
            started = time.perf_counter()
            for _ in range(calls):
                self.call()
            return (time.perf_counter() - started) / calls


def measure(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every side in every round, after calls that warm up."""
    counts = {}
    for name, side in sides.items():
        side.seconds(1)
        counts[name] = max(1, math.ceil(SAMPLE_SECONDS / side.seconds(1)))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(sides[name].seconds(counts[name]))
    return samples


@dataclass
class Weights:
    """One [N, K] weight of ours, its decoded values, and one in NF4 of which bitsandbytes has the same codes."""

    n: int
    k: int
    with_nf4: bool = True
    ours: Int4Weight = field(init=False)
    decoded: Tensor = field(init=False)
    nf4: tuple[Tensor, Any, Int4Weight] | None = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.ours = random_weight(self.n, self.k, CPU)
        self.decoded = decode(self.ours, torch.float32)
        self.nf4 = nf4_pair(self.n, self.k, torch.float32, CPU) if self.with_nf4 else None

    def sides(
        self, ours: Callable[[Int4Weight], Call], dense: Callable[[Tensor], Call], theirs: Callable[..., Call]
    ) -> dict[str, Side]:
        """All sides of one problem; SystemExit where two that have the same weight do not agree."""
        plain, scalar = partial(native.using, "off"), bitsandbytes_path.without_avx512
        same = {"ours": Side(ours(self.ours)), "torch": Side(dense(self.decoded))}
        groups = [(same, dense(self.decoded))]
        if native.instructions() is not None:
            same["plain"] = Side(ours(self.ours), plain)
        if self.nf4 is not None:
            packed, state, weight = self.nf4
            nf4 = {"ours_nf4": Side(ours(weight)), "bitsandbytes": Side(theirs(packed, state))}
            if native.instructions() is not None:
                nf4["plain_nf4"] = Side(ours(weight), plain)
            if bitsandbytes_path.path() == "avx512":
                nf4["bitsandbytes_scalar"] = Side(theirs(packed, state), scalar)
            groups.append((nf4, dense(decode(weight, torch.float32))))
        for group, right in groups:
            expected = tensors(right())
            for name, side in group.items():
                with side.inside():
                    found = tensors(side.call())
                if not all(map(partial(close, relative=SAME[torch.float32]), found, expected)):
                    raise SystemExit(f"{name} computes something else than torch on the decoded weight")
        return {name: side for group, _ in groups for name, side in group.items()}


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def without_grad(product: Product, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return product(x)

    return call


def forward_sides(weights: Weights, m: int) -> dict[str, Side]:
    x = normal(m, weights.k, dtype=torch.float32, device=CPU)

    def theirs(packed: Tensor, state: Any) -> Call:
        import bitsandbytes

        return without_grad(lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state), x)

    return weights.sides(
        lambda weight: without_grad(lambda x: int4_matmul(x, weight, backend="panel"), x),
        lambda decoded: without_grad(lambda x: x @ decoded.t(), x),
        theirs,
    )


def dx_sides(weights: Weights, m: int) -> dict[str, Side]:
    dy = normal(m, weights.n, dtype=torch.float32, device=CPU)

    def theirs(packed: Tensor, state: Any) -> Call:
        from bitsandbytes.functional import dequantize_4bit

        return without_grad(lambda dy: dy @ dequantize_4bit(packed, state), dy)  # the product in its backward pass

    return weights.sides(
        lambda weight: without_grad(lambda dy: int4_matmul_dx(dy, weight, backend="panel"), dy),
        lambda decoded: without_grad(lambda dy: dy @ decoded, dy),
        theirs,
    )


def lora_sides(weights: Weights, m: int) -> dict[str, Side]:
    """Forward and backward, with the gradients of X, A and B."""
    x = normal(m, weights.k, dtype=torch.float32, device=CPU).requires_grad_()
    a = (normal(RANK, weights.k, dtype=torch.float32, device=CPU) / weights.k**0.5).requires_grad_()
    b = (0.02 * normal(weights.n, RANK, dtype=torch.float32, device=CPU)).requires_grad_()
    dy = normal(m, weights.n, dtype=torch.float32, device=CPU)

    def step(layer: Product) -> Call:
        return lambda: torch.autograd.grad(layer(x), (x, a, b), dy)

    def around(product: Product) -> Call:
        return step(lambda x: product(x) + (x @ a.t() * SCALING) @ b.t())

    def theirs(packed: Tensor, state: Any) -> Call:
        import bitsandbytes

        return around(lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state))

    return weights.sides(
        lambda weight: step(lambda x: int4_lora_linear(x, weight, None, a, b, SCALING, "panel")),
        lambda decoded: around(lambda x: x @ decoded.t()),
        theirs,
    )


def loss_sides(weights: Weights, m: int) -> dict[str, Side]:
    """Cross-entropy over a head, and its gradient; bitsandbytes has no side, since it leaves the head in 16 bits."""
    hidden = normal(m, weights.k, dtype=torch.float32, device=CPU).requires_grad_()
    targets = torch.randint(0, weights.n, (m,))

    def step(loss: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(), hidden)

    return weights.sides(
        lambda weight: step(lambda: int4_cross_entropy(hidden, weight, targets, backend="panel")[0].mean()),
        lambda decoded: step(lambda: torch.nn.functional.cross_entropy(hidden @ decoded.t(), targets)),
        lambda packed, state: lambda: None,
    )


GROUPS = {"forward": forward_sides, "dX": dx_sides, "LoRA layer, forward and backward": lora_sides}


def all_sides(
    shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], head: tuple[int, int]
) -> Iterator[tuple[str, str, dict[str, Side]]]:
    """Group, problem and sides of everything that is timed."""
    with_nf4 = importlib.util.find_spec("bitsandbytes") is not None
    weights = {(n, k): Weights(n, k, with_nf4) for n, k in shapes}
    for group, sides in GROUPS.items():
        for (n, k), weight in weights.items():
            for m in tokens:
                yield group, f"M={m}, {n} x {k}", sides(weight, m)
    sides = loss_sides(Weights(*head, with_nf4=False), HEAD_TOKENS)
    yield "loss, forward and backward", f"M={HEAD_TOKENS}, {head[0]} x {head[1]}", sides


def record(rounds: int, shapes: Any = SHAPES, tokens: Any = TOKENS, head: Any = HEAD) -> dict[str, Any]:
    """Times everything; the JSON that ``report.py`` and ``kernel_table.py`` read."""
    found = [
        {
            "group": group,
            "problem": problem,
            "side": side,
            "median_seconds": statistics.median(samples),
            "samples_seconds": [round(value, 9) for value in samples],
        }
        for group, problem, sides in all_sides(shapes, tokens, head)
        for side, samples in measure(sides, rounds).items()
    ]
    facts = processor_facts()
    return {
        "machine_info": environment() | facts | {"cpu": facts["processor"], "bitsandbytes": bitsandbytes_path.path()},
        "timers": ["time.perf_counter"],
        "commit": commit(),
        "changed_files": bool(git("status", "--porcelain", "--untracked-files=no")),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "benchmarks": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often the sides take turns")
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(record(arguments.rounds), indent=1) + "\n")


if __name__ == "__main__":
    main()
