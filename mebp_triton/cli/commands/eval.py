"""``mebp eval``: loss, perplexity and token accuracy on a file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from mebp_triton.cli.console import answer, console, progress_bar, readable, two_columns
from mebp_triton.cli.inference import check_length, load_for_inference, load_tokenizer
from mebp_triton.data.chat import Masking
from mebp_triton.data.loading import load_data
from mebp_triton.data.sources import check_source
from mebp_triton.store.reader import Store
from mebp_triton.system.memory import peak_resident_bytes
from mebp_triton.training.evaluation import evaluate


def run(arguments: argparse.Namespace) -> None:
    store = Path(arguments.store)
    Store(store)
    check_source(arguments.validation_file, "validation-file")
    if arguments.max_eval_windows is not None and arguments.max_eval_windows < 1:
        raise ValueError(f"--max-eval-windows must be at least 1, got {arguments.max_eval_windows}")
    check_length(store, arguments.max_length)
    tokenizer = load_tokenizer(store)
    masking = Masking(arguments.completion_only_loss, arguments.assistant_only_loss)
    data = load_data(
        arguments.validation_file, tokenizer, arguments.max_length, name="validation-file", masking=masking
    )
    model = load_for_inference(store, arguments)
    console.print(f"{arguments.validation_file}: {data.report.describe()}", highlight=False, soft_wrap=True)
    with progress_bar("evaluating") as update:
        result = evaluate(model, data, arguments.max_eval_windows, update)
    value = dataclasses.asdict(result) | {"perplexity": result.perplexity, "peak_rss_bytes": peak_resident_bytes()}
    answer(arguments, value, two_columns(arguments.validation_file, readable(value)))
