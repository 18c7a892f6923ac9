"""``mebp export``: writes an adapter, or a model with it, as other programs load it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer, progress_bar, readable, say, two_columns
from mebp_triton.cli.flags import add_adapter
from mebp_triton.convert.writers import GGUF_FLOATS, GGUF_TYPES

if TYPE_CHECKING:
    from mebp_triton.store.reader import Store

TOLERABLE = 0.1  # the part of what an adapter changed that rounding may undo without a warning


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="the store that the adapter was trained on")
    parser.add_argument("output", metavar="OUT", help="the file or directory to make")
    add_adapter(parser, "none, which only gguf can do without")
    kinds = "; ".join(f"{name}: {text}" for name, (text, _) in KINDS.items())
    parser.add_argument("--to", required=True, choices=KINDS, help=kinds)
    parser.add_argument(
        "--type",
        choices=GGUF_TYPES,
        help=f"type of the matrices in a GGUF file (default: F16, of an adapter F32); an adapter's is one of "
        f"{', '.join(GGUF_FLOATS)}; those with K need libgguf",
    )
    parser.add_argument(
        "--base",
        metavar="FILE",
        help="a GGUF file of the base model (default: the one that the store was made of, if it is still there)",
    )


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.starting_adapter import say_doubt
    from mebp_triton.store.reader import Store

    if arguments.adapter is None and arguments.to != "gguf":
        raise ValueError(f"--to {arguments.to} needs an adapter: give --adapter RUN")
    store = Store(arguments.store)
    value: dict[str, Any] = {"output": arguments.output, "to": arguments.to, "adapter": arguments.adapter}
    value |= KINDS[arguments.to][1](store, arguments)
    say_doubt(arguments.adapter, store)
    path = Path(arguments.output)
    files = [path] if path.is_file() else path.rglob("*")
    value["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    answer(arguments, value, two_columns(arguments.output, readable(value)))


def _gguf_lora(store: Store, arguments: argparse.Namespace) -> dict[str, Any]:
    from mebp_triton.convert.export import export_gguf_adapter
    from mebp_triton.models.adapter import CHAT_TEMPLATE

    kind = arguments.type or "F32"
    made = export_gguf_adapter(store, arguments.output, arguments.adapter, kind, arguments.base)
    base = "BASE.gguf" if made.base is None else str(made.base)
    if made.changed:
        say(f"warning: {base} has changed since the store was made of it, so the adapter was trained on other weights")
    template = Path(arguments.adapter) / CHAT_TEMPLATE
    if template.is_file():
        say(f"a GGUF adapter holds no chat template: give llama.cpp --jinja --chat-template-file {template}")
    return {
        "type": kind,
        "base": None if made.base is None else base,
        "relative_error": made.relative_error,
        "use": f"llama-server -m {quote(base)} --lora {quote(arguments.output)}",
    }


def _gguf(store: Store, arguments: argparse.Namespace) -> dict[str, Any]:
    from mebp_triton.convert.export import export_gguf_model

    kind = arguments.type or "F16"
    with progress_bar("writing") as update:
        made, ends = export_gguf_model(store, arguments.output, arguments.adapter, kind, arguments.base, update)
    if ends:
        say(f"the file has no key for the tokens {ends}, at which the adapter stops too: stop there by the server")
    if other := {name: count for name, count in made.kinds.items() if name not in (kind, "F32")}:
        counts = ", ".join(f"{count} as {name}" for name, count in sorted(other.items()))
        say(f"not all matrices are {kind} ({counts}): embedding and head have 8 bits at least, and blocks must fit")
    if made.lost is not None and made.lost > TOLERABLE:
        say(
            f"warning: what rounding to {kind} changed is {made.lost:.2g} times as large as what the adapter changed; "
            "--to gguf-lora keeps all of it, beside the base file as it is"
        )
    return {
        "type": kind,
        "copied_tensors": made.copied,
        "relative_error": made.relative_error,
        "rounding_beside_adapter": made.lost,
        "use": f"llama-server -m {quote(arguments.output)}",
    }


def _peft(store: Store, arguments: argparse.Namespace) -> dict[str, Any]:
    from mebp_triton.convert.export import export_peft_adapter

    if arguments.type or arguments.base:
        raise ValueError("--type and --base are for GGUF files: leave them out")
    made = export_peft_adapter(store, arguments.output, arguments.adapter)
    base, (rounded, worst) = made.base.name_or_path, made.rounded
    if base.endswith(".gguf"):
        say(f"{base} is a GGUF file, which llama.cpp serves: --to gguf-lora")
    elif rounded:
        say(
            f"{rounded} of the store's {len(store.matrices)} matrices were rounded (relative error up to {worst:.2g}), "
            f"so a server of {base} computes a little else than what was trained: `mebp merge` makes a model of its own"
        )
    return {
        "base": base,
        "rank": made.rank,
        "ranks_or_scalings_made_equal": made.made_equal,
        "rounded_matrices": rounded,
        "use": f"vllm serve {quote(base)} --enable-lora --max-lora-rank {made.rank_limit} "
        f"--lora-modules {quote(f'mine={arguments.output}')}",
    }


# What can be made: in words, and by which function.
KINDS: dict[str, tuple[str, Callable[[Store, argparse.Namespace], dict[str, Any]]]] = {
    "gguf-lora": ("the adapter alone as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER", _gguf_lora),
    "gguf": ("the merged model as a GGUF file, after a GGUF file of its base", _gguf),
    "peft": ("the adapter as vLLM and SGLang take it, with one rank and one scaling", _peft),
}
