"""A store's tokenizer, config, model and validation text, as the commands need them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking
from mebp_triton.data.sources import check_source
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.kernels.tables import DTYPES
from mebp_triton.models import adapter
from mebp_triton.models.config import read_config
from mebp_triton.models.load import load
from mebp_triton.store.reader import Store
from mebp_triton.system.foreign_errors import one_line
from mebp_triton.system.machine import available_memory_bytes, resolve_device
from mebp_triton.training.evaluation import Evaluation, evaluate
from mebp_triton.training.run_directory import run_settings_beside

from .chat_template import template_of_run, use_template, use_template_of
from .console import progress_bar

MEASURED_TOKENS = 2048  # enough to see whether a merge keeps what was learnt


def load_tokenizer(directory: Path, adapter_directory: str | Path | None = None) -> Any:
    """The tokenizer of a model or store directory, with the adapter's chat template if it has one.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    with (
        _printing_to_stderr(),
        one_line(f"{directory} has no usable tokenizer", "put the model's tokenizer files there"),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("it turns the letter a into no token")
    use_template_of(tokenizer, adapter_directory)
    return tokenizer


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """While active, what a library prints past Python on standard output goes to standard error.

    tokenizers, in Rust, prints warnings there, and a command's standard output is its answer.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        kept = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def model_config(given: Path) -> Any:
    """The config of a model or store directory, or in a config.json. Nothing is fetched, and none of its code runs."""
    if given.suffix == ".gguf" and given.is_file():
        raise ValueError(f"{given} is a GGUF file: `mebp quantize` it, and give the store")
    return read_config(given, "give a transformers model directory or its config.json")


def check_length(directory: Path, max_length: int) -> None:
    """Raises ValueError where a window of ``max_length`` tokens is longer than the model takes."""
    longest = getattr(model_config(directory).get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(
            f"max_length {max_length} is longer than the {longest} tokens that the model takes: give at most {longest}"
        )


def load_validation(store: Path, arguments: argparse.Namespace) -> TokenizedData:
    """The windows of ``--validation-file``, by the tokenizer of store and adapter; see ``flags.add_validation``."""
    check_source(arguments.validation_file, "validation-file")
    check_length(store, arguments.max_length)
    template = template_of_run(getattr(arguments, "chat_template", None), [])  # a flag of eval alone
    tokenizer = load_tokenizer(store, None if template else arguments.adapter)
    if template:
        use_template(tokenizer, template, f"chat-template {arguments.chat_template}")
    return read_validation(tokenizer, arguments)


def read_validation(tokenizer: Any, arguments: argparse.Namespace) -> TokenizedData:
    """The windows of ``--validation-file`` by ``tokenizer``."""
    masking = Masking(arguments.completion_only_loss, arguments.assistant_only_loss)
    return load_data(
        arguments.validation_file, tokenizer, arguments.max_length, name="validation-file", masking=masking
    )


def load_run_text(store: Path, adapter_directory: str) -> tuple[str, TokenizedData] | None:
    """The first rows that an adapter was trained on, at most some thousand tokens, and the name of their file.

    Returns:
        None where the adapter does not lie in the directory of its run.

    Raises:
        ValueError: the run's file is not there any more, or cannot be read.
    """
    settings = run_settings_beside(Path(adapter_directory))
    if settings is None:
        return None
    data = load_data(
        settings.train_file,
        load_tokenizer(store, adapter_directory),
        settings.max_length,
        masking=settings.masking(),
        most_tokens=MEASURED_TOKENS,
    )
    return settings.train_file, data


def load_for_inference(
    store: Store | Path,
    adapter_directory: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    backend: str = "auto",
) -> Any:
    """The model of ``store`` with the adapter; weights stay in their files on a CPU, and are copied to a GPU.

    Where the files are less than half of the memory that is available, their pages stay resident once they were read.
    """
    device = resolve_device(device)
    store = store if isinstance(store, Store) else Store(store)
    if store.nbytes() < available_memory_bytes() // 2:
        for file in store.files.values():
            file.mapped.kept = True
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    lora = adapter.read_adapter_config(adapter_directory) if adapter_directory else None
    model = load(
        store,
        lora,
        weights="file" if device == "cpu" else "device",
        device=device,
        dtype=DTYPES[dtype],
        backend=backend,
    )
    if adapter_directory:
        adapter.restore_adapter(model, adapter_directory)
    return model


def evaluate_with_progress(
    model: Any, data: TokenizedData, windows: int | None, description: str = "evaluating"
) -> Evaluation:
    """The result of ``evaluate``, under a progress bar with this description."""
    with progress_bar(description) as update:
        return evaluate(model, data, windows, update)
