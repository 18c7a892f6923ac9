"""Flags that several commands share. Nothing here imports torch: a mistyped flag must be answered at once."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mebp_triton.convert.calibration import CALIBRATION_WINDOWS
from mebp_triton.kernels.names import (
    BACKENDS,
    BITS,
    DEFAULT_FORM,
    DEFAULT_FORMS,
    FLOAT_NAMES,
    GROUP_SIZES_OF_BITS,
    SCHEMES,
)

MAX_LENGTH = 512  # tokens of a window, where nothing is asked for


def at_least_one(text: str) -> int:
    """A type for ``add_argument``: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return value


def add_settings(parser: argparse.ArgumentParser, settings: type, needed: Collection[str] = ()) -> None:
    """Adds one flag per field of the dataclass ``settings``. A flag that is not given stays out of the namespace.

    ``needed``: fields whose help says that they must be given, here or in the file of ``--config``.
    """
    kinds = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        flag, kind = "--" + field.name.replace("_", "-"), kinds[field.name]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": field.metadata["help"]}
        if field.default not in (None, ""):
            shown = {False: "off", True: "on"}[field.default] if isinstance(field.default, bool) else field.default
            options["help"] += f" (default: {shown})"
        if field.name in needed:
            options["help"] += "; required, here or in --config"
        parts = get_args(kind) if get_origin(kind) not in (None, Literal) else (kind,)
        kind = next(part for part in parts if part is not type(None))
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), **options)
        else:
            parser.add_argument(flag, type=kind, metavar=field.name.split("_")[-1].upper(), **options)


FORM_FLAGS = ("--scheme", "--group-size", "--bits", "--embedding-bits")


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how a float matrix becomes int4; ``asked_form`` reads ``FORM_FLAGS``."""
    add_linear_form(parser, "the source's")
    parser.add_argument(
        "--embedding-bits",
        type=int,
        choices=BITS,
        help="width of the codes of embedding and head (default: the source's, or 8); --scheme and --group-size hold "
        "for 4",
    )
    parser.add_argument(
        "--scale-search",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="search each scale for the least squared error (default: on)",
    )


def add_linear_form(parser: argparse.ArgumentParser, own: str) -> None:
    """Adds the flags for the form of linear layers; ``own`` says whose form is the default."""
    scheme, size, bits = DEFAULT_FORM
    wide = DEFAULT_FORMS[8].scheme
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        help=f"how the codes of linear layers become weights (default: {own}, or {scheme}, with 8 bits {wide})",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES_OF_BITS[8],
        help=f"weights per scale in linear layers; 16 with 8 bits only (default: {own}, or {size})",
    )
    parser.add_argument(
        "--bits", type=int, choices=BITS, help=f"width of the codes of linear layers (default: {own}, or {bits})"
    )


def asked_form(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of ``FORM_FLAGS``, by the names that ``quantize`` has for them; None for what was not asked for."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in FORM_FLAGS]
    return {name: getattr(arguments, name) for name in names}


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``inference.load_for_inference`` reads."""
    add_adapter(parser)
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=FLOAT_NAMES, help="dtype of activations (default: bfloat16 on a GPU, float32 on a CPU)"
    )


def add_adapter(parser: argparse.ArgumentParser, default: str = "none") -> None:
    """Adds ``--adapter``, whose value is the adapter's own directory; ``default`` says what holds without it."""
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        type=_adapter_directory,
        help=f"a run directory, or an adapter in PEFT's format (default: {default})",
    )


def _adapter_directory(text: str) -> str:
    from mebp_triton.models.adapter_directory import find_adapter

    return str(find_adapter(text))


def add_device(parser: argparse.ArgumentParser, use: str = "") -> None:
    """Adds ``--device`` and ``--backend``; ``use`` opens their help."""
    parser.add_argument(
        "--device", metavar="DEVICE", help=f"{use}cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help=f"{use}kernels (default: auto)")


def add_validation(parser: argparse.ArgumentParser, required: bool, use: str) -> None:
    """Adds the flags that ``inference.load_validation`` reads; ``use`` is the help of ``--validation-file``."""
    parser.add_argument("--validation-file", required=required, metavar="FILE", help=use)
    parser.add_argument(
        "--max-length", type=int, default=MAX_LENGTH, metavar="N", help=f"tokens per window (default: {MAX_LENGTH})"
    )
    parser.add_argument(
        "--completion-only-loss",
        action=argparse.BooleanOptionalAction,
        help="mask prompts, as in train (default: where rows have prompt and completion)",
    )
    parser.add_argument(
        "--assistant-only-loss",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mask all chat messages but the assistant's, as in train (default: off)",
    )
    parser.add_argument(
        "--max-eval-windows",
        type=at_least_one,
        metavar="N",
        help="evaluate on this many evenly spaced windows (default: all)",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``source_texts.SourceTexts`` reads."""
    parser.add_argument(
        "--calibration-file",
        metavar="FILE",
        help="a text like those that the model is for: linear layers are rounded so that they change little on it",
    )
    parser.add_argument(
        "--calibration-windows",
        type=at_least_one,
        default=CALIBRATION_WINDOWS,
        metavar="N",
        help=f"calibrate with this many evenly spaced windows (default: {CALIBRATION_WINDOWS})",
    )
    add_validation(parser, required=False, use="a text to measure the loss of the source and of the store on")


def add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--plot", metavar="FILE", help=f"draw {what} as a PNG")


def plot_path(arguments: argparse.Namespace) -> Path | None:
    """The file that ``--plot`` names.

    Raises:
        ValueError: its directory does not exist, or matplotlib is not installed.
    """
    if not arguments.plot:
        return None
    path = Path(arguments.plot)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path} names no file in an existing directory")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib: pip install 'mebp-triton[plots]'")
    return path


def with_flags(message: str, names: Collection[str]) -> str:
    """Spells settings in ``message`` as flags: ``max_length`` becomes ``--max-length``.

    What stands in quotes or in a path stays. So does a name of one word, which may be a word of the sentence, unless
    the message begins with it and says what it must be.
    """

    def as_flag(match: re.Match[str]) -> str:
        name = match[0].replace("-", "_")
        return f"--{name.replace('_', '-')}" if name in names else match[0]

    message = re.sub(r"^[a-z]+(?= must be )", as_flag, message)
    return re.sub(r"(?<![^\s(])[a-z]+(?:[_-][a-z]+)+(?=[\s,;:)]|$)", as_flag, message)
