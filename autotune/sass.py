"""What a compiled kernel does in its main loop, read from its machine code (SASS).

The main loop is a backward branch around matrix instructions. Triton ships the disassembler, so no GPU and no CUDA
toolkit are needed.
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

# Tensor-core instructions; UTC...MMA are those of sm_100, issued by one thread for a whole program.
TENSOR = re.compile(r"(HMMA|HGMMA|QGMMA|IMMA|UTC\w*MMA)\b")
# What products are made of where there are none, as before sm_80 and for float32.
PLAIN = re.compile(r"FFMA2?\b")
# Integer to float; each runs at a quarter or less of the rate of an integer instruction.
CONVERSIONS = frozenset({"I2F", "I2FP"})
# What taking codes out of words is made of; moves and addresses are not in here.
UNPACKING = frozenset({"LOP3", "PRMT", "SHF", "SHL", "SHR", "SGXT", "BFE"})
INTEGER = UNPACKING | {"IMAD", "IADD", "IADD3", "VIADD", "LEA", "SEL", "ISETP", "IABS", "VIMNMX", "IMNMX"}

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its name with modifiers (``HMMA.16816.F32``), its operands."""

    address: int
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class LoopCounts:
    """One warp's instructions in one trip of a main loop.

    Attributes:
        issue_slots: all of them.
        matrix: matrix instructions.
        integer: integer instructions, addresses and predicates included.
        unpacking: those of them that take codes out of words.
        conversions: from integer to float.
        tensor: "HMMA", "HGMMA", ...: the kind of its matrix instructions; "FFMA" without tensor cores.
    """

    issue_slots: int
    matrix: int
    integer: int
    unpacking: int
    conversions: int
    tensor: str


@cache
def cuobjdump_path() -> Path:
    """The cuobjdump that Triton ships."""
    return Path(nvidia.__path__[0]) / "bin" / "cuobjdump"


def cuobjdump(cubin: bytes, option: str) -> str:
    """What ``cuobjdump`` prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump_path(), option, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> str:
    return cuobjdump(cubin, "-sass")


def parse(sass: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    found = (LINE.match(line) for line in sass.splitlines())
    return [Instruction(int(match[1], 16), match[2], match[3]) for match in found if match]


def main_loops(sass: str) -> list[Counter[str]]:
    """Counts by full name of every innermost loop with matrix instructions, in the order of their addresses.

    A loop is what lies between the target of a backward branch and that branch. Slow paths laid out behind the kernel
    jump back into its middle and look like longer loops that overlap the true ones: of those that overlap, only the
    shortest is one.
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
    """What the static reports need of one loop."""
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
    )
