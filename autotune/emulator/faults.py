"""Errors of the emulator: what a program did wrong, and what cannot be executed here."""

from __future__ import annotations

from typing import Any


class NotModelled(ValueError):
    """An instruction, or a form of one, that the emulator cannot execute. Nothing is guessed in its place."""


class Fault(Exception):
    """Something that a kernel must not do.

    Attributes:
        kind: "out of bounds", "misaligned", "uninitialised", "shared race", "global race", "register race",
            "divergence", "undefined register" or "endless".
        instruction: the ``parser.Instruction`` that did it; None until the machine adds it.
    """

    def __init__(self, kind: str, message: str, instruction: Any = None) -> None:
        super().__init__(message if instruction is None else f"{kind}: {message}\n  at {instruction}")
        self.kind, self.message, self.instruction = kind, message, instruction
