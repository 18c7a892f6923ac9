"""Compiled kernels into which errors are planted, each with the problems that should show them.

There is one problem that fills tiles, has ragged edges and goes round the loop more often than there are stages; others
that end within one of the steps that the pipeline loads ahead; and one with unit vectors, which gives decoded weights.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "support"))

from ptx_mutations import Mutation, mutations  # noqa: E402

from mebp_triton.autotune.cases import Case  # noqa: E402
from mebp_triton.autotune.correctness import Prepared, Verdict, prepare  # noqa: E402
from mebp_triton.autotune.emulator.driver import Emulator, Launch  # noqa: E402
from mebp_triton.autotune.emulator.faults import Fault  # noqa: E402
from mebp_triton.autotune.emulator.parser import Instruction, Number, parse  # noqa: E402
from mebp_triton.autotune.emulator.parser import Kernel as ParsedKernel  # noqa: E402
from mebp_triton.kernels.configs import TileConfig  # noqa: E402
from mebp_triton.kernels.reference import decode  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WRONG, MISSED = "wrong result", "missed"
ACCESS = re.compile(r"(@\S+ )?(cp\.async\.c[ag]|(ld|st)\.shared|(ld|st)matrix|wgmma\.mma)")
SHARED = re.compile(ACCESS.pattern + r"|bar\.|cp\.async\.wait|wgmma\.wait")


class Units:
    """A product with unit vectors, and with zeros for LoRA and bias: the decoded weights, to the bit."""

    def __init__(self, case: Case) -> None:
        self.product: Any = prepare(case)
        matrices = [decode(weight, case.dtype) for weight in self.product.weights]
        forward = case.kernel == "matmul"
        inputs = [self.product.x] if forward else self.product.dys
        others = (self.product.t, self.product.bias) if forward else (self.product.g,)
        for one in (*inputs, *others):
            if one is not None:
                one.zero_()
        rows = [matrix.t() for matrix in matrices] if forward else [torch.cat(matrices)]
        # The ones are spread over the whole reduction.
        places = torch.arange(case.m) * (len(rows[0]) - 1) // (case.m - 1)
        self.wanted = [matrix[places] for matrix in rows]
        firsts = [0, *torch.tensor([one.shape[1] for one in inputs]).cumsum(0).tolist()]
        for row, place in enumerate(places.tolist()):
            for one, first, end in zip(inputs, firsts, firsts[1:], strict=False):
                if first <= place < end:
                    one[row, place - first] = 1

    def launch(self) -> list[Tensor]:
        return self.product.launch()  # type: ignore[no-any-return]

    def judge(self, found: list[Tensor]) -> Verdict:
        ok = all(torch.equal(one, wanted) for one, wanted in zip(found, self.wanted, strict=True))
        return Verdict(ok, 0.0, None if ok else "the product with a unit vector is not the decoded weight")


@dataclass
class Kernel:
    """A compiled kernel and its problems, which all launch the same PTX.

    Attributes:
        name: of the kernel's Python function.
        target: compute capability.
    """

    name: str
    target: int
    cases: Sequence[Case]

    def __str__(self) -> str:
        return f"sm_{self.target} {self.cases[0]}"

    @functools.cached_property
    def prepared(self) -> list[Prepared]:
        units = [Units(self.cases[0])] if self.cases[0].kernel in ("matmul", "matmul_dx") else []
        return [*map(prepare, self.cases), *units]

    @functools.cached_property
    def runs(self) -> list[Launch]:
        """One launch of each problem. Without an error, all launch the same PTX, and their results are right."""
        found = []
        for one in self.prepared:
            with Emulator(self.target, count=True) as emulator:
                verdict = one.judge(one.launch())
            assert verdict.ok, f"{self}: {verdict.reason}"
            found += [launch for launch in emulator.launches if launch.name == self.name]
        assert len({launch.compiled.ptx for launch in found}) == 1, f"{self}: its problems launch different kernels"
        return found

    @property
    def ptx(self) -> str:
        return self.runs[0].compiled.ptx

    @functools.cached_property
    def parsed(self) -> ParsedKernel:
        return parse(self.ptx)

    @functools.cached_property
    def instructions(self) -> dict[int, Instruction]:
        """The instructions by their line, from 0."""
        return {one.line - 1: one for one in self.parsed.code}

    @functools.cached_property
    def reached(self) -> set[int]:
        """The lines that a problem executes. What is left serves reductions without steps, and ranks of zero."""
        counts = [launch.counts.executed for launch in self.runs if launch.counts is not None]
        return {one.line - 1 for one, times in zip(self.parsed.code, sum(counts), strict=True) if times}

    @functools.cached_property
    def mutations(self) -> list[Mutation]:
        """All errors in what is executed, but for those that change nothing for a reason that the text tells.

        A loop may take one step more, and its pipeline may load what no step needs: the masks are false there. Chunks
        of 64 columns may begin at K only if K is a multiple of 64. Of two barriers with nothing between them, one does.
        """
        chunks_end = any(case.k % 64 == 0 for case in self.cases)

        def matters(one: Mutation) -> bool:
            code = source_text(self.instructions[one.line].source)
            if one.kind == "barrier removed":
                return self.is_needed(one.line)
            if one.kind == "mask dropped":
                mask = self.predicate_of(one.line)
                return mask is None or not (
                    source_text(mask.source).startswith("for ") or isinstance(mask.operands[-1], Number)
                )
            if one.kind == "bound one too far":
                return "<" in code and (chunks_end or not re.search(r"// 32 \* 64 < K|\(offs_c < K\)", code))
            return True

        return [one for one in mutations(self.ptx) if one.line in self.reached and matters(one)]

    def is_needed(self, line: int) -> bool:
        """Whether, behind a barrier, there is a way to an access to shared memory before the next barrier."""
        code, todo, seen = self.parsed.code, [self.parsed.code.index(self.instructions[line]) + 1], set[int]()
        while todo:
            at = todo.pop()
            one = code[at]
            if ACCESS.match(one.text):
                return True
            if at in seen or one.parts[0] in ("bar", "ret"):
                continue
            seen.add(at)
            if one.parts[0] == "bra":
                todo.append(self.parsed.labels[one.operands[0].name])
            if one.parts[0] != "bra" or one.guard is not None:
                todo.append(at + 1)
        return False

    def predicate_of(self, line: int, text: str | None = None) -> Instruction | None:
        """The instruction that sets the predicate of another one, the last of those that it or ``text`` names."""
        predicates = re.findall(r"%p\d+", text or self.instructions[line].text)
        sets = re.compile(rf"\S+ {predicates[-1]}, " if predicates else "$")
        return next((other for other in self.instructions.values() if sets.match(other.text)), None)

    def neighbour(self, line: int, step: int) -> str:
        """The nearest instruction before a line (step -1) or behind it (1) that has to do with shared memory."""
        others = [one for at, one in sorted(self.instructions.items(), reverse=step < 0) if (at - line) * step > 0]
        return next((one.text for one in others if SHARED.match(one.text)), "")

    def outcome(self, mutation: Mutation) -> str:
        """The kind of the fault that an error leads to, ``WRONG`` or ``MISSED``."""
        changed = mutation.apply(self.ptx)
        for prepared in self.prepared:
            # A copy, because an error may make a kernel write into what it should only read.
            one = copy.deepcopy(prepared)
            with Emulator(self.target, edit=lambda ptx: changed if ptx == self.ptx else ptx):
                try:
                    verdict = one.judge(one.launch())
                except Fault as fault:
                    return fault.kind
            if not verdict.ok:
                return WRONG
        return MISSED


@functools.cache
def source_text(source: str) -> str:
    """The text of the line of Python that an instruction's ``source`` names first; "" for none."""
    name, _, line = source.partition(" ")[0].partition(":")
    path = ROOT / "kernels" / name
    if not path.is_file() or not int(line or 0):
        return ""
    return path.read_text().split("\n")[int(line) - 1].strip()


def of_sizes(kernel: str, *sizes: tuple[int, tuple[int, ...], int], **more: Any) -> list[Case]:
    """Problems with these m, out-features and k."""
    return [Case(kernel, m=m, sizes=n, k=k, **more) for m, n, k in sizes]  # type: ignore[arg-type]


def product(kernel: str, target: int, config: TileConfig, members: int = 1, whole: bool = False, **more: Any) -> Kernel:
    """A product. whole: sizes are multiples of 16, which compiles to wider accesses, as real models' do."""
    m, n, k = config.block_m, config.block_n, config.block_k
    # How far problems reach into their last tile of M, N and K; the sizes of the smallest problem; ranks. The edge of K
    # lies now among the columns of high nibbles, now among those of low ones.
    edges, sizes, ranks = ((5, 5, 38), (3, 13, 10)), [(m - 3, 5, 40)], (20, 40, 44)
    if whole:
        # A tile of 128 columns may also end between its two chunks.
        edges, sizes, ranks = ((16, 16, 48 if k == 64 else 64), (32, 32, 16)), [(m, 16, 48)], (32, 48, 64)
    for place, steps in enumerate((config.num_stages + 2, *range(2, max(3, config.num_stages)))):
        before = steps * config.split - 1
        tiles = (m, n, k * before) if kernel == "matmul" else (m, n * max(1, before // members), k)
        sizes.append(tuple(map(sum, zip(tiles, edges[place % 2], strict=True))))  # type: ignore[arg-type]
    cases = [
        Case(
            kernel,  # type: ignore[arg-type]
            config,
            m=m,
            sizes=tuple(n + 16 * (1 + whole) * place for place in range(members)),
            k=k,
            rank=ranks[min(index, 2)],
            **{"layout": "padded", "bias": kernel == "matmul", **more},
        )
        for index, (m, n, k) in enumerate(sizes)
    ]
    return Kernel(f"_{kernel}_kernel", target, [*cases[1:], cases[0]])


def kernels() -> Iterator[Kernel]:
    """A spread over kernels, schemes, group sizes, dtypes and targets."""
    tile = TileConfig
    # Operands decoded to registers for mma; to registers and to shared memory for wgmma (sm_90).
    yield product("matmul", 80, tile(16, 64, 64, 4, 3), dtype=BF16)
    yield product("matmul", 80, tile(64, 64, 64, 4, 3), whole=True, group_size=32, dtype=BF16)
    yield product("matmul", 80, tile(16, 64, 64, 4, 3, split=4), scheme="affine", dtype=FP16)
    yield product("matmul", 87, tile(32, 64, 64, 4, 4, scale_sums=True), whole=True, dtype=FP16)
    yield product("matmul", 87, tile(32, 32, 128, 4, 2), members=3, scheme="codebook", dtype=FP16)
    yield product("matmul", 80, tile(16, 32, 64, 4, 2), dtype=FP32, layout="offset", scale_dtype=FP32)
    yield product("matmul", 90, tile(64, 64, 64, 4, 3), members=3, scheme="affine", group_size=32, dtype=BF16)
    yield product("matmul", 90, tile(64, 128, 128, 8, 2), whole=True, group_size=128, dtype=FP16)
    yield product("matmul", 120, tile(32, 64, 64, 4, 3, split=4), whole=True, scheme="codebook", dtype=BF16)
    yield product("matmul", 80, tile(32, 64, 64, 4, 3), bits=8, scheme="affine", dtype=BF16)
    yield product("matmul_dx", 80, tile(64, 64, 64, 8, 2), dtype=BF16)
    yield product("matmul_dx", 80, tile(32, 64, 128, 4, 3, split=2, weight_left=False), whole=True, dtype=FP16)
    yield product("matmul_dx", 87, tile(32, 32, 64, 4, 2), members=3, scheme="codebook", group_size=32, dtype=BF16)
    yield product("matmul_dx", 80, tile(16, 32, 64, 4, 2), scheme="affine", dtype=FP32)
    yield product("matmul_dx", 90, tile(64, 64, 128, 4, 3, weight_left=False), members=3, scheme="affine", dtype=FP16)
    yield product("matmul_dx", 90, tile(64, 64, 128, 8, 2, weight_left=False), whole=True, dtype=BF16)
    yield product("matmul_dx", 86, tile(32, 64, 64, 4, 3), bits=8, whole=True, dtype=FP16)
    yield product("matmul_dx", 120, tile(64, 64, 64, 8, 2), whole=True, scheme="affine", dtype=FP16)
    # Decoded rows must agree to the bit.
    table = (21, (70,), 166), (3, (5,), 40), (35, (37,), 138)
    rows = of_sizes("embedding", *table, layout="padded", scheme="affine", group_size=32, dtype=BF16)
    yield Kernel("_embedding_kernel", 80, rows)
    yield Kernel("_embedding_kernel", 87, of_sizes("decode", *table, layout="padded", dtype=BF16))
    table = (1, (80,), 192), (1, (16,), 176), (1, (96,), 80)
    rows = of_sizes("decode", *table, layout="padded", scheme="codebook", dtype=FP16)
    yield Kernel("_embedding_kernel", 90, rows)
    tiles = (3, (1050, 2070), 2), (2, (70, 33), 2), (5, (1027, 1539), 2)
    yield Kernel("_softmax_tile_kernel", 80, of_sizes("softmax_tile", *tiles, bias=True, dtype=BF16))
    yield Kernel("_softmax_tile_kernel", 120, of_sizes("softmax_tile", *tiles, dtype=FP32, layout="padded"))
    parts = (1, (1040, 80), 2), (1, (48, 16), 2)
    yield Kernel("_sum_parts_kernel", 90, of_sizes("split_sums", *parts, split=4, dtype=BF16))
    yield from expert_kernels()
    yield from small_kernels()


def expert_kernels() -> Iterator[Kernel]:
    """Products of experts with no token, with less than a tile and with more; sizes as ``product`` has them."""

    def over_experts(kernel: str, target: int, whole: bool, *tile: int, left: bool = True, **more: Any) -> Kernel:
        sizes: Any = ((69, (69, 0, 35), 294), (13, (3, 20), 74), (37, (0, 5, 2), 138)), (20, 40, 44)
        if whole:
            sizes = ((80, (80, 0, 48), 304), (16, (48, 16), 112), (48, (16, 32), 144)), (32, 48, 64)
        more |= {"config": TileConfig(*tile, weight_left=left), "layout": "padded"}
        cases = [of_sizes(kernel, size, rank=rank, **more)[0] for size, rank in zip(*sizes, strict=True)]
        return Kernel(f"_{kernel}_kernel", target, cases)

    yield over_experts("expert_matmul", 80, False, 16, 64, 64, 4, 3, scheme="affine", dtype=BF16)
    yield over_experts("expert_matmul", 90, True, 64, 64, 64, 4, 2, scale_dtype=torch.int8, dtype=FP16)
    yield over_experts("expert_matmul_dx", 87, True, 16, 32, 64, 4, 2, group_size=32, dtype=BF16)
    yield over_experts("expert_matmul_dx", 90, False, 64, 32, 64, 4, 2, left=False, scheme="codebook", dtype=FP16)


def small_kernels() -> Iterator[Kernel]:
    """The kernels without int4 weights. A case of some launches two of them, of which one is meant."""
    rows = (33, (1,), 70), (17, (1,), 102)
    for number, (name, dtype) in enumerate((("_rms_norm_kernel", BF16), ("_rms_norm_dx_kernel", FP16))):
        yield Kernel(name, (80, 90)[number], of_sizes("rms_norm", *rows, layout="padded", dtype=dtype))
    # Heads that fill no block of heads, and columns behind those that are rotated.
    heads = (5, (19, 3), 70), (3, (35, 33), 54)
    for target, style in ((80, "forward"), (90, "inverse")):
        yield Kernel("_rope_kernel", target, of_sizes("rope", *heads, rank=36, split=2, style=style, dtype=BF16))
    columns = (3, (1030,), 1), (2, (70,), 1)
    for name, target, style, dtype in (
        ("_gated_activation_kernel", 90, "silu", BF16),
        ("_gated_activation_backward_kernel", 80, "gelu_tanh", FP32),
    ):
        yield Kernel(name, target, of_sizes("gated_activation", *columns, layout="padded", style=style, dtype=dtype))
    # The second one's loads are pipelined, as a model's are.
    tokens = (330, (70, 5, 37), 1), (131, (35, 67, 3), 1), (7, (33, 35, 7), 1)
    yield Kernel("_lora_gradients_kernel", 80, of_sizes("lora_gradients", *tokens, rank=9, dtype=BF16))
    tokens = (336, (80, 16, 48), 16), (144, (48, 80, 16), 16), (80, (16, 48, 80), 16), (16, (16, 16, 16), 16)
    yield Kernel("_lora_gradients_kernel", 90, of_sizes("lora_gradients", *tokens, rank=48, dtype=FP16))
