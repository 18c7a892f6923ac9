"""The parser of the command line. A command's flags lie beside its code, which is imported when the command is used."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from mebp_triton import __version__

from .suggestions import near_command, suggestion

# Every command and its help. Its module ``commands.NAME`` has ``add_flags(parser)`` and ``run(arguments)``.
COMMANDS = {
    "quantize": "make an int4 store from a model directory or a GGUF file",
    "train": "fine-tune a store, or a model that is quantized first",
    "plan": "predict the peak memory of a training run, or choose settings for a memory budget",
    "eval": "measure loss, perplexity and token accuracy on a file",
    "generate": "continue a prompt",
    "merge": "turn a store and its adapter into a 16- or 32-bit model directory, or into a store again",
    "export": "write an adapter, or a model with it, for llama.cpp, Ollama, vLLM or SGLang",
    "tune": "find the fastest kernel configurations for this device, or for one that is elsewhere",
    "verify": "check every byte of a store against its checksums",
    "doctor": "show what this machine has and what is missing",
    "demo": "quantize, train, evaluate and generate with a real 135M model",
}
LISTED = "mebp --help lists the commands"


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the flag that was probably meant."""

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else list(args)
        # Refused here, not at the end of parsing, so that only flags of the command in question are suggested.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if message == "the following arguments are required: COMMAND":
            message = f"give a command, {LISTED}"
        elif message.startswith("the following arguments are required"):
            # What is missing may be there, behind a mistyped flag; argparse looks for that one later.
            unknown = [
                word for word in self._flags_given() if word.partition("=")[0] not in self._option_string_actions
            ]
            if unknown:
                meant = self._meant(unknown) or f"; {message}"
                message = f"unrecognized arguments: {' '.join(unknown)}{meant}"
        elif message.endswith("expected one argument"):
            message += self._value_with_dash(message)
        print(f"mebp: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def _flags_given(self) -> list[str]:
        return [word for word in self.words if word.startswith("--") and len(word) > 2]

    def _meant(self, unknown: Sequence[str]) -> str:
        """Returns a suggestion for the first flag of ``unknown``, as the end of a message."""
        mistyped = next((word for word in unknown if word.startswith("-")), "")
        positionals = [str(action.metavar) for action in self._actions if not action.option_strings]
        return suggestion(mistyped, self._option_string_actions, positionals)

    def _value_with_dash(self, message: str) -> str:
        """How to write a value that argparse takes for a flag, as the end of its message that there is none."""
        flags = message.removeprefix("argument ").partition(":")[0].split("/")
        for flag, value in pairwise(self.words):
            if flag in flags and value.startswith("-") and value not in self._option_string_actions:
                return f"; a value that begins with - is written {flag}={shlex.quote(value)}"
        return ""


class _MainParser(_Parser):
    """Refuses a command that does not exist before argparse does, to suggest one that does."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words: list[str] = sys.argv[1:] if args is None else list(args)
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in COMMANDS:
            near = near_command(command, COMMANDS)
            self.error(f"there is no command {command!r}{near or f': {LISTED}'}")
        for word in words[: words.index(command) if command else None]:
            if word.startswith("-") and word not in self._option_string_actions:
                meant = suggestion(word, self._option_string_actions)
                behind = f"flags are written behind the command, as in mebp {command or 'COMMAND'} ... {word}"
                other = behind if word.startswith("--") else LISTED
                self.error(f"unrecognized arguments: {word}{meant or f': {other}'}")
        return super().parse_known_args(words, namespace)


class _CommandParser(_Parser):
    """The parser of one command. It imports the command's module when it parses, and takes its flags from there."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("run") is None:
            command = importlib.import_module(f".commands.{self.prog.split()[-1]}", __package__)
            command.add_flags(self)
            self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``mebp``. Parsed arguments have ``command``, ``json``, ``debug``, ``run`` and the command's own."""
    parser = _MainParser(prog="mebp", description="Fine-tune 4-bit language models with LoRA by true gradients.")
    parser.add_argument("--version", action="version", version=f"mebp {__version__}")
    common = _CommandParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
    return parser
