"""A store's tokenizer, config and model, as the commands need them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from mebp_triton.models import adapter
from mebp_triton.models.config import read_config
from mebp_triton.models.load import load
from mebp_triton.system.foreign_errors import one_line
from mebp_triton.system.machine import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
