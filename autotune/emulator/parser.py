"""Reads PTX: text becomes a ``Kernel``, a list of instructions with registers, labels and source lines resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .faults import NotModelled

# Bits of a register by its declared type; 1 is a predicate.
REGISTER_BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}
REGISTER_BITS |= {f"{kind}{bits}": bits for kind in "us" for bits in (8, 16, 32, 64)}
REGISTER_BITS |= {f"f{bits}": bits for bits in (16, 32, 64)}

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
LABEL = re.compile(r"([$%\w]+):")
LOC = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)(?:,[^\n]*?inlined_at (\d+) (\d+) \d+)?[^\n]*")
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid)(?:\.([xyz]))?$")
STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$")
ADDRESS = re.compile(r"\[\s*([$%\w.]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]$")
BITS_OF_FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")
INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9]\d*)U?$")


@dataclass(frozen=True)
class Register:
    """A register: its place in the register file, and its bits."""

    index: int
    bits: int


@dataclass(frozen=True)
class Number:
    """A number in the text. An instruction says how many of its bits count."""

    value: int


@dataclass(frozen=True)
class Special:
    """A register that the hardware sets, such as ``tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable in shared memory, or a parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: a register or a symbol, and bytes."""

    base: Any
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``; None stands for ``_``."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: the two results of one instruction."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Label:
    """The target of a branch."""

    name: str


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        name: its name with all modifiers, such as ``ld.global.v4.b32``.
        guard: the predicate register that it depends on, and whether that is negated.
        line: its line in the PTX text, from 1.
        source: the line of Python, "matmul.py:139", or "decode.py:195 < matmul.py:144" in an inlined function.
        text: the instruction as written.
    """

    name: str
    operands: list[Any]
    guard: tuple[Register, bool] | None
    line: int
    source: str
    text: str

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")

    def __str__(self) -> str:
        return f"line {self.line} ({self.source}): {self.text}"


@dataclass
class Kernel:
    """The one entry of a module.

    Attributes:
        params: name and bytes of each, in order.
        labels: the place in ``code`` that each stands for.
        registers: the name of each register, by its place in the register file.
        shared: offset of each variable in the kernel's shared memory. The one whose size the launch decides lies at 0.
        shared_bytes: how many bytes those of known size need.
        threads: threads of a block; 0 if the text does not say.
    """

    name: str
    params: list[tuple[str, int]] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[str] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    threads: int = 0


def parse(text: str) -> Kernel:
    """Reads a module with one kernel. Raises NotModelled for what is not understood."""
    return _Parser(text).kernel


class _Parser:
    def __init__(self, text: str) -> None:
        # Comments become blanks, so that lines keep their numbers.
        self.text = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        files = re.findall(r'\.file\s+(\d+) "([^"]*)"', self.text)
        self.files = {number: path.rpartition("/")[2] for number, path in files}
        entry = re.search(r"\.visible \.entry (\w+)\s*\((.*?)\)([^{]*)\{", self.text, re.DOTALL)
        if entry is None or self.text.count(".entry ") != 1 or re.search(r"\.func\b", self.text):
            raise NotModelled("the PTX must hold one kernel and no device functions")
        self.kernel = Kernel(entry[1])
        self._read_variables(self.text[: entry.start()], self.text[entry.start() :])
        self._read_params(entry[2])
        if threads := re.search(r"\.(?:req|max)ntid\s+(\d+)\s*(?:,\s*1\s*)*$", entry[3].rstrip()):
            self.kernel.threads = int(threads[1])
        self.scopes: list[dict[str, Register]] = [{}]
        self._read_body(entry.end())
        self._check_labels()

    def _read_variables(self, head: str, body: str) -> None:
        for match in re.finditer(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]", head):
            align, size = int(match[1]), int(match[3] or 0)
            offset = -(-self.kernel.shared_bytes // align) * align
            self.kernel.shared[match[2]] = offset
            self.kernel.shared_bytes = offset + size
        # CUDA's functions leave a name of theirs there, which no instruction reads.
        variables = re.findall(r"\.(?:global|const)\s+\.align\s+\d+\s+\.\w+\s+([\w$]+)", head)
        if not set(re.findall(r"[\w$]+", body)).isdisjoint(variables):
            raise NotModelled("variables of a module in global or constant memory are not modelled")

    def _read_params(self, listed: str) -> None:
        for line in filter(None, (part.strip() for part in listed.split(","))):
            match = re.match(r"\.param (?:\.align \d+ )?\.(\w+)\s+.*?(\w+)$", line)
            if match is None or match[1] not in REGISTER_BITS:
                raise NotModelled(f"parameter not understood: {line}")
            self.kernel.params.append((match[2], REGISTER_BITS[match[1]] // 8))

    def _read_body(self, at: int) -> None:
        """Reads up to the brace that closes the kernel. Debug sections behind it are of no interest."""
        text, source, counted, line = self.text, "?", 0, 1
        while self.scopes:
            while text[at].isspace():
                at += 1
            line += text.count("\n", counted, at)
            counted = at
            if text[at] == "{":
                self.scopes.append({})
                at += 1
            elif text[at] == "}":
                self.scopes.pop()
                at += 1
            elif match := LOC.match(text, at):
                source = f"{self.files.get(match[1], match[1])}:{match[2]}"
                if match[4]:
                    source += f" < {self.files.get(match[4], match[4])}:{match[5]}"
                at = match.end()
            elif match := LABEL.match(text, at):
                self.kernel.labels[match[1]] = len(self.kernel.code)
                at = match.end()
            else:
                end = text.index(";", at)
                self._read_statement(" ".join(text[at:end].split()), line, source)
                at = end + 1

    def _read_statement(self, text: str, line: int, source: str) -> None:
        if text.startswith(".reg "):
            self._declare(text)
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise NotModelled(f"line {line}: not modelled: {text}")
        elif match := STATEMENT.match(text):
            guard = (self._register(match[2], line), match[1] == "!") if match[2] else None
            operands = [self._operand(part, line) for part in _split(match[4])]
            self.kernel.code.append(Instruction(match[3], operands, guard, line, source, text))
        else:
            raise NotModelled(f"line {line}: not understood: {text}")

    def _declare(self, text: str) -> None:
        match = re.match(r"\.reg \.(\w+)\s+(.*)", text)
        if match is None or match[1] not in REGISTER_BITS:
            raise NotModelled(f"not understood: {text}")
        for listed in match[2].split(","):
            for name in _declared(listed.strip()):
                self.scopes[-1][name] = Register(len(self.kernel.registers), REGISTER_BITS[match[1]])
                self.kernel.registers.append(name)

    def _register(self, name: str, line: int) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise NotModelled(f"line {line}: {name} is not declared")

    def _operand(self, text: str, line: int) -> Any:
        if text[0] == "{":
            items = [part.strip() for part in text[1:-1].split(",")]
            return Vector(tuple(None if item == "_" else self._operand(item, line) for item in items))
        if match := ADDRESS.match(text):
            offset = int(match[3], 0) * (-1 if match[2] == "-" else 1) if match[3] else 0
            return Address(self._operand(match[1], line), offset)
        if "|" in text:
            return Pair(tuple(self._operand(item.strip(), line) for item in text.split("|")))
        if BITS_OF_FLOAT.match(text):
            return Number(int(text[2:], 16))
        if match := INTEGER.match(text):
            # In PTX, as in C, a leading zero makes a number octal.
            base = 16 if match[2][:2] in ("0x", "0X") else 8 if match[2][0] == "0" else 10
            return Number(int(match[2], base) * (-1 if match[1] else 1))
        if match := SPECIAL.match(text):
            return Special(f"{match[1]}.{match[2]}" if match[2] else match[1])
        if text.startswith("$"):
            return Label(text)
        if any(text in scope for scope in self.scopes):
            return self._register(text, line)
        if re.match(r"[A-Za-z_][\w$]*$", text):
            return Symbol(text)
        raise NotModelled(f"line {line}: operand not understood: {text}")

    def _check_labels(self) -> None:
        for one in self.kernel.code:
            for operand in one.operands:
                if isinstance(operand, Label) and operand.name not in self.kernel.labels:
                    raise NotModelled(f"{one}: there is no such label")


def _declared(listed: str) -> Iterator[str]:
    """The names that ``%r<3>`` declares; any other name declares itself."""
    if many := re.match(r"(.*)<(\d+)>$", listed):
        yield from (f"{many[1]}{number}" for number in range(int(many[2])))
    else:
        yield listed


def _split(text: str) -> list[str]:
    """Cuts operands apart, at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
