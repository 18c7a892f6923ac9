"""``mebp export``: writes an adapter, or a model with it, as other programs load it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mebp_triton.cli.console import answer, readable, two_columns
from mebp_triton.cli.flags import add_adapter
from mebp_triton.convert.writers import GGUF_FLOATS

KINDS = {
    "gguf-lora": "the adapter alone as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the store that the adapter was trained on")
    parser.add_argument("output", metavar="OUT", help="the file or directory to make")
    add_adapter(parser)
    kinds = "; ".join(f"{name}: {text}" for name, text in KINDS.items())
    parser.add_argument("--to", required=True, choices=KINDS, help=kinds)
    parser.add_argument("--type", choices=GGUF_FLOATS, help="type of the tensors (default: F32)")
    parser.add_argument(
        "--base",
        metavar="FILE",
        help="a GGUF file of the base model (default: the one that the store was made of, if it is still there)",
    )


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.starting_adapter import say_doubt
    from mebp_triton.store.reader import Store

    if arguments.adapter is None:
        raise ValueError(f"--to {arguments.to} needs an adapter: give --adapter RUN")
    store = Store(arguments.store)
    value: dict[str, Any] = {"output": arguments.output, "to": arguments.to, "adapter": arguments.adapter}
    value |= _gguf_lora(store, arguments)
    say_doubt(arguments.adapter, store)
    path = Path(arguments.output)
    files = [path] if path.is_file() else path.rglob("*")
    value["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    answer(arguments, value, two_columns(arguments.output, readable(value)))


def _gguf_lora(store: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from mebp_triton.convert.export import export_gguf_adapter

    kind = arguments.type or "F32"
    made = export_gguf_adapter(store, arguments.output, arguments.adapter, kind, arguments.base)
    base = "BASE.gguf" if made.base is None else str(made.base)
    return {
        "type": kind,
        "base": None if made.base is None else base,
        "relative_error": made.relative_error,
        "use": f"llama-server -m {base} --lora {arguments.output}",
    }
