"""Errors planted into PTX: each changes one instruction, as a compiler's or an author's mistake would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One changed instruction: what kind of error, its line (from 0), and what stands there instead."""

    kind: str
    line: int
    text: str

    def apply(self, ptx: str) -> str:
        lines = ptx.split("\n")
        lines[self.line] = self.text
        return "\n".join(lines)


def mutations(ptx: str) -> list[Mutation]:
    """Every mutation of a kernel, in the order of its lines."""
    return [
        Mutation(kind, number, text) for number, line in enumerate(ptx.split("\n")) for kind, text in _of(line.strip())
    ]


def _of(code: str) -> Iterator[tuple[str, str]]:
    code = " ".join(code.split())
    if code.startswith("bar.sync"):
        yield "barrier removed", ""
    if code.startswith("fence.proxy.async"):
        yield "proxy fence removed", ""
    if match := re.match(r"(cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned) (\d+);", code):
        yield "one group less waited for", f"{match[1]} {int(match[2]) + 1};"
    if match := re.match(r"@!?%p\d+ ((?:ld|st)\.global.*)", code):
        yield "guard dropped", match[1]
    if re.match(r"(?:st|ld)\.shared", code) and (match := re.search(r"\[(%r\d+)(?:\+(\d+))?\]", code)):
        yield "address moved", code.replace(match[0], f"[{match[1]}+{int(match[2] or 0) + 16}]")
    if code.startswith("ldmatrix"):
        yield "transposition", code.replace(".trans", "") if ".trans" in code else code.replace(".x4.", ".x4.trans.")
    if match := re.match(r"(mma\.sync\S+ \{.*?\}, \{) (\S+), (\S+), (\S+) (\S+ .*)", code):
        yield "operands exchanged", f"{match[1]} {match[2]}, {match[4].rstrip(',')}, {match[3]}, {match[5]}"
    if match := re.match(r"setp\.lt\.s32 (.*)", code):
        yield "< made <=", f"setp.le.s32 {match[1]}"
    if match := re.match(r"prmt\.b32 (.*), 0x4140;", code):
        yield "wrong selector", f"prmt.b32 {match[1]}, 0x4141;"
    if match := re.match(r"selp\.b32 (\S+), (8|16|4), 0, (%p\d+);", code):
        yield "copy of what is not there", f"mov.b32 {match[1]}, {match[2]};"
