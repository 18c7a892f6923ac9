"""The parser of the command line. A command's flags lie beside its code, which is imported when the command is used."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from mebp_triton import __version__

# Every command and its help. Its module ``commands.NAME`` has ``add_flags(parser)`` and ``run(arguments)``.
COMMANDS = {
    "quantize": "make an int4 store from a model directory or a GGUF file",
    "train": "fine-tune a store, or a model that is quantized first",
    "plan": "predict the peak memory of a training run, or choose settings for a memory budget",
    "eval": "measure loss, perplexity and token accuracy on a file",
    "generate": "continue a prompt",
    "merge": "turn a store and its adapter into a 16- or 32-bit model directory, or into a store again",
    "tune": "find the fastest kernel configurations for this device, or for one that is elsewhere",
    "verify": "check every byte of a store against its checksums",
    "doctor": "show what this machine has and what is missing",
    "demo": "quantize, train, evaluate and generate with a real 135M model",
}


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the flag that was probably meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Refused here, not at the end of parsing, so that only flags of the command in question are suggested.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            mistyped = next((word for word in unknown if word.startswith("--")), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(mistyped.split('=')[0], flags)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        print(f"mebp: error: {message}", file=sys.stderr)
        raise SystemExit(2)


class _MainParser(_Parser):
    """Refuses a command that does not exist before argparse does, to suggest one that does."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words: list[str] = sys.argv[1:] if args is None else list(args)
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in COMMANDS:
            near = _suggestion(command, COMMANDS)
            self.error(f"there is no command {command!r}{near or ': mebp --help lists the commands'}")
        return super().parse_known_args(words, namespace)


class _CommandParser(_Parser):
    """The parser of one command. It imports the command's module when it parses, and takes its flags from there."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("run") is None:
            command = importlib.import_module(f".commands.{self.prog.split()[-1]}", __package__)
            command.add_flags(self)
            self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)


def _suggestion(mistyped: str, existing: Iterable[str]) -> str:
    near = difflib.get_close_matches(mistyped, existing, n=1)
    return f"; did you mean {near[0]}?" if near else ""


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
