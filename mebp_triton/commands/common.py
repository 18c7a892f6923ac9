"""What the commands share. Messages and progress go to standard error, answers to standard output."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mebp_triton import adapter
from mebp_triton.config import resolve_device
from mebp_triton.importers import one_line, read_config
from mebp_triton.model import load
from mebp_triton.report import MIB

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
console = Console(stderr=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """Yields ``update(done, total, note="", task=description)``; every task has a bar of its own.

    Nothing is shown before the first update, and nothing stays of a bar that a user's mistake ended.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=console)
    tasks: dict[str, Any] = {}

    def update(done: int, total: int, note: str = "", task: str = description) -> None:
        if task not in tasks:
            bar.start()
            tasks[task] = bar.add_task(task, total=total, note=note)
        bar.update(tasks[task], completed=done, total=total, note=note)

    finish = bar.stop
    try:
        yield update
    except ValueError:
        bar.live.transient = True
        finish = bar.live.stop
        raise
    finally:
        if tasks:
            finish()


def answer(arguments: argparse.Namespace, value: dict[str, Any], table: Table) -> None:
    """The command's result: JSON where asked for, a table otherwise."""
    if arguments.json:
        print(json.dumps(value, indent=2))
    else:
        Console().print(table)


def two_columns(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def readable(summary: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, value in summary.items():
        if value is None:
            continue
        if name.endswith("_bytes"):
            rows[name.removesuffix("_bytes").replace("_", " ")] = f"{value / MIB:.1f} MiB"
        else:
            rows[name.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return rows


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """What a library in another language prints on standard output goes to standard error: the output is an answer."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def load_tokenizer(store: Path) -> Any:
    with (
        _printing_to_stderr(),
        one_line(f"{store} has no usable tokenizer", "put the model's tokenizer files there"),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(store, local_files_only=True, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("what is there makes no token of a letter")
        return tokenizer


def check_length(store: Path, max_length: int) -> None:
    config = model_config(store).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(f"max_length {max_length} is longer than the {longest} tokens that the model takes")


def model_config(given: Path) -> Any:
    """The config of a model or store directory, or in a config.json. Nothing is fetched, and none of its code runs."""
    if given.suffix == ".gguf" and given.is_file():
        raise ValueError(f"{given} is a GGUF file: `mebp quantize` it, and give the store")
    return read_config(given, "give a transformers model directory or its config.json")


def load_for_inference(store: Path, arguments: argparse.Namespace) -> Any:
    """The model with its adapter, weights where inference wants them."""
    device = resolve_device(arguments.device)
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    lora = adapter.read_adapter_config(arguments.adapter) if arguments.adapter else None
    model = load(
        store,
        lora,
        weights="file" if device == "cpu" else "device",
        device=device,
        dtype=DTYPES[dtype],
        backend=arguments.backend,
    )
    if arguments.adapter:
        adapter.load_adapter(model, arguments.adapter)
    return model
