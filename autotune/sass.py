"""Counts the instructions of a compiled kernel's main loop in its machine code (SASS).

The main loop is a loop with matrix instructions, closed by a backward branch. Triton ships the disassembler, so neither
a GPU nor the CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from triton.backends import nvidia

# Tensor-core instructions. On sm_100 they are UTC...MMA, which one thread issues for a whole program.
TENSOR = re.compile(r"(HMMA|HGMMA|QGMMA|IMMA|UTC\w*MMA)\b")
# Products without tensor cores, as before sm_80 and for float32.
PLAIN = re.compile(r"FFMA2?\b")
# Conversions from integer to float, which run at a quarter or less of the rate of other integer instructions.
CONVERSIONS = frozenset({"I2F", "I2FP"})
# Instructions that take codes out of words. Moves and addresses are not among them.
UNPACKING = frozenset({"LOP3", "PRMT", "SHF", "SHL", "SHR", "SGXT", "BFE"})
INTEGER = UNPACKING | {"IMAD", "IADD", "IADD3", "VIADD", "LEA", "SEL", "ISETP", "IABS", "VIMNMX", "IMNMX"}

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its name with modifiers (such as ``HMMA.16816.F32``), and its operands."""

    address: int
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class LoopCounts:
    """Numbers of one warp's instructions in one trip of a main loop.

    Attributes:
        issue_slots: all instructions.
        matrix: matrix instructions.
        integer: integer instructions, those for addresses and predicates included.
        unpacking: integer instructions that take codes out of words.
        conversions: conversions from integer to float.
        tensor: the kind of matrix instruction, "HMMA", "HGMMA", ..., or "FFMA" without tensor cores.
        loads: loads from global memory into registers, for which a warp waits. Those of a codebook's numbers, which are
            read where they are used, are not among them: the kernels read nothing else by ``ld.global.nc``.
        copies: copies from global to shared memory (``cp.async``), for which it does not wait.
    """

    issue_slots: int
    matrix: int
    integer: int
    unpacking: int
    conversions: int
    tensor: str
    loads: int = 0
    copies: int = 0


@cache
def cuobjdump_path() -> Path:
    """Path of the cuobjdump that Triton ships."""
    return Path(nvidia.__path__[0]) / "bin" / "cuobjdump"


def cuobjdump(cubin: bytes, option: str) -> str:
    """The output of ``cuobjdump`` for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump_path(), option, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> str:
    return cuobjdump(cubin, "-sass")


def parse(sass: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    matches = (LINE.match(line) for line in sass.splitlines())
    return [Instruction(int(match[1], 16), match[2], match[3]) for match in matches if match]


def main_loops(sass: str) -> list[Counter[str]]:
    """Instructions by full name of every innermost loop with matrix instructions, in the order of their addresses.

    A loop lies between the target of a backward branch and that branch. Slow paths that are laid out behind the kernel
    jump back into its middle, and look like longer loops that overlap the true ones. So of overlapping loops only the
    shortest counts.
    """
    code = parse(sass)
    matrix = TENSOR if any(TENSOR.match(one.name) for one in code) else PLAIN
    at = [one.address for one in code if matrix.match(one.name)]
    loops: list[tuple[int, int]] = []
    for start, end in sorted(_backward_branches(code), key=lambda span: span[1] - span[0]):
        apart = all(end < other_start or other_end < start for other_start, other_end in loops)
        if apart and any(start <= address <= end for address in at):
            loops.append((start, end))
    return [Counter(one.name for one in code if start <= one.address <= end) for start, end in sorted(loops)]


def _backward_branches(code: list[Instruction]) -> list[tuple[int, int]]:
    spans = []
    for one in code:
        targets = re.findall(r"\b0x([0-9a-f]+)", one.operands) if one.base == "BRA" else []
        if targets and int(targets[-1], 16) <= one.address:
            spans.append((int(targets[-1], 16), one.address))
    return spans


def count(loop: Counter[str]) -> LoopCounts:
    """Sums up one loop's instructions by kind."""
    bases: Counter[str] = Counter()
    for name, times in loop.items():
        bases[name.partition(".")[0]] += times

    def total(names: frozenset[str] | set[str]) -> int:
        return sum(bases[name] for name in names)

    tensor = {name for name in bases if TENSOR.match(name)}
    matrix = tensor or {name for name in bases if PLAIN.match(name)}
    return LoopCounts(
        issue_slots=sum(loop.values()),
        matrix=total(matrix),
        integer=total(INTEGER),
        unpacking=total(UNPACKING),
        conversions=total(CONVERSIONS),
        tensor=max(matrix, key=lambda name: bases[name]),
        loads=bases["LDG"] - sum(times for name, times in loop.items() if name.startswith("LDG.E.CONSTANT")),
        copies=bases["LDGSTS"],
    )
