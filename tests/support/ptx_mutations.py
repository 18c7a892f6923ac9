"""Errors planted into PTX: each is a small mistake of an author or a compiler, in one instruction.

A mistake in the bound of a mask is made in all instructions that one expression of Python has become, because the edge
of a tensor meets few of them. A group of copies that is not ended becomes a part of the next one, so only the last of
several in a row is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

GROUPS = ("barriers", "wait groups", "guards", "addresses", "transpositions", "selectors", "operands")
ACCESS = r"(?:ld|st)\.(?:global|shared)|cp\.async\.c[ag]|(?:ld|st)matrix"
PLACE = re.compile(r"\[ ?([%\w]+) ?(?:\+ ?(\d+) ?)?\]")
VECTOR = r"\{ ?(\S+), (\S+), (\S+), (\S+?) ?\}"
BITS = {"16": 2, "32": 4, "64": 8, "8": 1}


@dataclass(frozen=True)
class Mutation:
    """One error.

    Attributes:
        group: one of ``GROUPS``.
        kind: what is wrong.
        changes: lines of the PTX, from 0, and what stands there instead.
    """

    group: str
    kind: str
    changes: tuple[tuple[int, str], ...]

    @property
    def line(self) -> int:
        return self.changes[0][0]

    def apply(self, ptx: str) -> str:
        lines = ptx.split("\n")
        for line, text in self.changes:
            lines[line] = text
        return "\n".join(lines)


def mutations(ptx: str) -> list[Mutation]:
    """Every mutation of a kernel, in the order of its lines."""
    found, place, bounds = [], "", dict[tuple[str, ...], list[tuple[int, str]]]()
    for number, line in enumerate(ptx.split("\n")):
        code = " ".join(line.partition("//")[0].split())
        if code.startswith(".loc"):
            place = code
        elif match := re.fullmatch(r"setp\.lt\.(\S+) (\S+, %\S+, (%\S+));", code):
            bounds.setdefault((place, match[3]), []).append((number, f"setp.le.{match[1]} {match[2]};"))
        elif code.endswith(";") and not code.startswith("."):
            found += [Mutation(group, kind, ((number, text),)) for group, kind, text in _of(code) if text != code]
    found += [Mutation("guards", "bound one too far", tuple(changes)) for changes in bounds.values()]
    joined = _groups_that_join(ptx)
    found = [one for one in found if one.kind != "group not ended" or one.line not in joined]
    return sorted(found, key=lambda one: one.line)


def _groups_that_join(ptx: str) -> set[int]:
    """Lines of commits behind which, before any wait or label, there is another commit."""
    found, last = set(), None
    for number, line in enumerate(ptx.split("\n")):
        if "commit_group" in line:
            found |= set() if last is None else {last}
            last = number
        elif "wait_group" in line or line.startswith("$L__BB"):
            last = None
    return found


def _of(code: str) -> Iterator[tuple[str, str, str]]:
    for group, kind, pattern, change in OPERATORS:
        if match := re.fullmatch(pattern, code):
            yield from ((group, kind, text) for text in change(match))


Change = Callable[[re.Match[str]], Iterator[str]]


def _as(*templates: str) -> Change:
    """Changes that are written as templates, with ``\\1`` for a part of the old instruction."""
    return lambda match: (match.expand(template) for template in templates)


def _one_more(match: re.Match[str]) -> Iterator[str]:
    yield f"{match[1]}{int(match[2]) + 1}{match[3]}"


def _one_less(match: re.Match[str]) -> Iterator[str]:
    yield f"{match[1]}{int(match[2]) - 1}{match[3]}"


def _moved(match: re.Match[str]) -> Iterator[str]:
    """Each address of an access, moved by as many bytes as the access has."""
    code = match[0]
    parts = code.partition(" ")[0].split(".")
    width = 16
    if parts[0].startswith("@"):
        parts = code.split(" ")[1].split(".")
    if parts[0] in ("ld", "st"):
        width = BITS[re.sub(r"\D", "", parts[-1])] * next(
            (int(one[1:]) for one in parts if one in ("v2", "v4", "v8")), 1
        )
    elif parts[0] == "cp":
        width = int(code.split(", ")[2].rstrip(";"), 16)
    for place in PLACE.finditer(code):
        yield f"{code[: place.start()]}[{place[1]}+{int(place[2] or 0) + width}]{code[place.end() :]}"


def _lowest_bit_lost(match: re.Match[str]) -> Iterator[str]:
    mask = int(match[2])
    yield f"{match[1]}{mask & (mask - 1)};"


def _descriptor_moved(match: re.Match[str]) -> Iterator[str]:
    """By one row of 16 bytes. The number has the strides and the swizzle; the address is the other operand."""
    yield f"add.s64 {match[1]}, {match[2]}, {int(match[3]) + 1};"


def _transposed(match: re.Match[str]) -> Iterator[str]:
    code = match[0]
    yield code.replace(".trans.", ".") if ".trans." in code else code.replace(".shared", ".trans.shared")


def _other_flag(match: re.Match[str]) -> Iterator[str]:
    yield f"{match[1]}{1 - int(match[2])};"


def _inner_exchanged(match: re.Match[str]) -> Iterator[str]:
    yield f"{match[1]}{{{match[2]}, {match[4]}, {match[3]}, {match[5]}}}{match[6]}"


def _selectors(match: re.Match[str]) -> Iterator[str]:
    selector = int(match[2], 16)
    yield f"{match[1]}{selector ^ 1:#06x};"
    yield f"{match[1]}{selector >> 8 | (selector & 0xFF) << 8:#06x};"


def _other_lane(match: re.Match[str]) -> Iterator[str]:
    lane = int(match[2])
    yield f"{match[1]}{lane // 2 if lane > 1 else 2}{match[3]}"


def _half_mask(match: re.Match[str]) -> Iterator[str]:
    """The mask of nibbles is one bit too wide, or one too narrow."""
    mask = int(match[2], 0)
    yield f"{match[1]}{mask * 2 + (mask & -mask):#x};"
    yield f"{match[1]}{mask >> 1 & mask:#x};"


def _number_off(match: re.Match[str]) -> Iterator[str]:
    """A low bit of a float, or of both floats of a pair; one in place of a zero."""
    bits = int(match[3], 16)
    changed = bits ^ (0x10001 if match[3][:4] == match[3][4:] else 0x1000)
    if bits in (0, 0x80008000):
        changed = 0x3F803F80 if bits else 0x3F800000
    yield f"{match[1]}{match[2]}{changed:08X};"


def _exchanged_sides(match: re.Match[str]) -> Iterator[str]:
    yield f"{match[1]}{match[3]}, {match[2]}{match[4]}"


MMA = rf"(mma\.sync\S+ {VECTOR.replace('(', '(?:')}, )"
# group, kind, what the instruction looks like, what it becomes
OPERATORS: tuple[tuple[str, str, str, Change], ...] = (
    ("barriers", "barrier removed", r"bar\.(?:warp\.)?sync .*", _as("")),
    ("barriers", "proxy fence removed", r"fence\.proxy\.async.*", _as("")),
    ("barriers", "register fence removed", r"wgmma\.fence\.sync\.aligned;", _as("")),
    ("wait groups", "one group less waited for", r"((?:cp\.async|wgmma)\.wait_group\S* )(\d+)(;)", _one_more),
    ("wait groups", "wait removed", r"(?:cp\.async|wgmma)\.wait_group\S* \d+;", _as("")),
    ("wait groups", "group not ended", r"(?:cp\.async|wgmma)\.commit_group\S*;", _as("")),
    ("guards", "guard dropped", r"@!?%p\d+ ((?:ld|st)\.\S+ .*)", _as(r"\1")),
    ("guards", "half of a mask dropped", r"and\.pred (\S+), (\S+), (\S+);",
     _as(r"mov.pred \1, \2;", r"mov.pred \1, \3;")),
    ("guards", "mask dropped", r"selp\.b32 (\S+), (\S+), 0, %p\d+;", _as(r"mov.b32 \1, \2;")),
    ("addresses", "address moved", rf"(?:@!?%p\d+ )?(?:{ACCESS})\..*", _moved),
    ("addresses", "stride left out", r"mul\.lo\.s64 (\S+), (\S+), (\S+);", _as(r"mov.b64 \1, \2;")),
    ("addresses", "stride left out", r"mad\.lo\.s64 (\S+), (\S+), (\S+), (\S+);", _as(r"add.s64 \1, \2, \4;")),
    ("addresses", "term left out", r"add\.s(32|64) (\S+), (\S+), (%\S+);", _as(r"mov.b\1 \2, \3;", r"mov.b\1 \2, \4;")),
    ("addresses", "shift one less", r"(shl\.b\d+ \S+, \S+, )([1-9]\d*)(;)", _one_less),
    ("addresses", "swizzle left out", r"xor\.b32 (\S+), (\S+), (\S+);", _as(r"mov.b32 \1, \2;")),
    ("addresses", "descriptor moved", r"or\.b64 (\S+), (\S+), (-?\d{12,});", _descriptor_moved),
    ("addresses", "other bits of an index", r"(bfe\.u32 \S+, \S+, )(\d+)(, \d+;)", _one_more),
    ("addresses", "bit of an index lost", r"(and\.b32 \S+, %\S+, )([1-9]\d*);", _lowest_bit_lost),
    ("transpositions", "transposition", r"(?:ld|st)matrix\..*", _transposed),
    ("transpositions", "transposition", r"(wgmma\.mma_async.*, 1, 1, (?:[01], )?)([01]);", _other_flag),
    ("transpositions", "matrices exchanged", rf"((?:ld|st)matrix\S+ (?:\[.*\], )?){VECTOR}(.*)", _inner_exchanged),
    ("transpositions", "matrices exchanged", rf"{MMA}{VECTOR}(, .*)", _inner_exchanged),
    ("transpositions", "words exchanged", rf"((?:ld|st)\.shared\.v4\S+ (?:\[.*\], )?){VECTOR}(.*)", _inner_exchanged),
    ("selectors", "wrong selector", r"(prmt\.b32 .*, )(0x[0-9a-fA-F]+)U?;", _selectors),
    ("selectors", "sides exchanged", r"(selp\.\S+ \S+, )(\S+), (\S+)(, %p\d+;)", _exchanged_sides),
    ("selectors", "other lane", r"(shfl\.sync\.bfly\.b32 \S+, \S+, )(\d+)(, .*)", _other_lane),
    ("selectors", "other bits of a code", r"(and\.b32 \w+, \S+, )(0x0F0F0F0F|15);", _half_mask),
    ("selectors", "other bits of a code", r"(shr\.u32 [a-z]\w*, \S+, )([1-9]\d*)(;)", _one_less),
    ("selectors", "halves exchanged", r"(mov\.b32 \S+, \{)(%\S+), (%\S+)(\};)", _exchanged_sides),
    ("selectors", "halves exchanged", r"(mov\.b32 \{)([%\w]+), ([%\w]+)(\}, .*)", _exchanged_sides),
    ("selectors", "halves exchanged", r"(cvt\.rn\.\w+x2\.f32 \S+, )(\S+), (\S+)(;)", _exchanged_sides),
    ("operands", "operands exchanged", rf"({MMA[1:-1]}{VECTOR.replace('(', '(?:')}, \{{ ?)(\S+), (\S+)( ?\}}, .*)",
     _exchanged_sides),
    ("operands", "operands exchanged", r"(sub\.(?:s32|rn\.\w+) \S+, )(\S+), (\S+)(;)", _exchanged_sides),
    ("operands", "operands exchanged", r"(fma\.\S+ \S+, \S+, )(\S+), (\S+)(;)", _exchanged_sides),
    ("operands", "operand repeated", r"((?:add|mul)\.(?:rn\.)?(?:f|bf)\S+ \S+, )(\S+), (\S+);",
     _as(r"\1\2, \2;", r"\1\3, \3;")),
    ("operands", "sum forgotten", r"mov\.pred (\S+), -1;", _as(r"mov.pred \1, 0;")),
    ("operands", "sum forgotten", r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);", _as(r"mul.rn.f32 \1, \2, \3;")),
    ("operands", "number off", r"(sub\.rn\.f32 \S+, \S+, |mov\.b32 \S+, )(0f|0x)([0-9A-F]{8});", _number_off),
    ("operands", "maximum exchanged", r"max\.(.*)", _as(r"min.\1")),
)  # fmt: skip
