"""``mebp merge``: a store and its adapter become a model directory, or a store again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from mebp_triton.cli.console import answer, progress_bar, readable, two_columns
from mebp_triton.cli.inference import check_length, load_for_inference, load_tokenizer
from mebp_triton.cli.peft_baseline import evaluate as evaluate_plain
from mebp_triton.convert.merge import DTYPES, merge, merge_to_store
from mebp_triton.data.chat import Masking
from mebp_triton.data.loading import load_data
from mebp_triton.data.sources import check_source
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic
from mebp_triton.system.machine import resolve_device
from mebp_triton.training.evaluation import evaluate


def run(arguments: argparse.Namespace) -> None:
    as_store = arguments.as_store or arguments.scheme is not None or arguments.group_size is not None
    if as_store and arguments.dtype is not None:
        raise ValueError("--dtype is of a model directory; --as-store, --scheme and --group-size make a store: choose")
    if arguments.max_eval_windows is not None and arguments.max_eval_windows < 1:
        raise ValueError(f"--max-eval-windows must be at least 1, got {arguments.max_eval_windows}")
    store, output = Path(arguments.store), Path(arguments.output)
    Store(store)
    atomic.check_absent(output)
    data = _validation(store, arguments)
    windows = arguments.max_eval_windows
    value: dict[str, Any] = {"output": arguments.output, "adapter": arguments.adapter}
    before = None
    if data is not None:
        before = _loss(store, arguments.adapter, data, windows, "evaluating the store")
    with progress_bar("merging") as update:
        if as_store:
            options = arguments.scheme, arguments.group_size, arguments.scale_search
            report = merge_to_store(store, output, arguments.adapter, *options, update)
            anew = {name: error for name, error in report.errors.items() if name not in report.taken_over}
            value |= {"quantized_anew": len(anew), "relative_error_worst": max(anew.values(), default=0.0)}
        else:
            value["dtype"] = merge(store, output, arguments.adapter, arguments.dtype, update)
    value["bytes"] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if data is not None:
        if as_store:
            after = _loss(output, None, data, windows, "evaluating the merged store")
        else:
            after = _plain_loss(output, value["dtype"], data, windows)
        value |= {"loss_with_adapter": before, "loss_merged": after}
    answer(arguments, value, two_columns(arguments.output, readable(value)))


def _validation(store: Path, arguments: argparse.Namespace) -> TokenizedData | None:
    if arguments.validation_file is None:
        return None
    check_source(arguments.validation_file, "validation-file")
    check_length(store, arguments.max_length)
    masking = Masking(arguments.completion_only_loss, arguments.assistant_only_loss)
    options: dict[str, Any] = {"name": "validation-file", "masking": masking}
    return load_data(arguments.validation_file, load_tokenizer(store), arguments.max_length, **options)


def _loss(store: Path, adapter: str | None, data: TokenizedData, windows: int | None, what: str) -> float:
    settings = argparse.Namespace(adapter=adapter, device=None, dtype=None, backend="auto")
    model = load_for_inference(store, settings)
    with progress_bar(what) as update:
        return evaluate(model, data, windows, update).loss


def _plain_loss(directory: Path, dtype: str, data: TokenizedData, windows: int | None) -> float:
    """By transformers alone, in the dtype that was written; the whole model is in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False
    )
    device: Any = torch.device(resolve_device(None))
    return evaluate_plain(model.to(device), data, windows)[0]
