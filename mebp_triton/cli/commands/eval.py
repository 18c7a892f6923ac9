"""``mebp eval``: loss, perplexity and token accuracy on a file."""

from __future__ import annotations

import argparse
import dataclasses

from mebp_triton.cli.console import answer, readable, say, two_columns
from mebp_triton.cli.flags import add_inference, add_validation


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a chat template in Jinja for chat messages (default: the adapter's, or the tokenizer's)",
    )
    add_validation(
        parser, required=True, use="the text: .txt, .jsonl, .json, .csv, .parquet, or a directory of datasets"
    )
    add_inference(parser)


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.inference import evaluate_with_progress, load_for_inference, load_validation
    from mebp_triton.cli.starting_adapter import say_doubt
    from mebp_triton.store.reader import Store
    from mebp_triton.system.memory import peak_resident_bytes

    store = Store(arguments.store)  # refuses what is no store before the text is read
    data = load_validation(store.directory, arguments)
    model = load_for_inference(store, arguments.adapter, arguments.device, arguments.dtype, arguments.backend)
    say_doubt(arguments.adapter, store)
    say(f"{arguments.validation_file}: {data.report.describe()}")
    result = evaluate_with_progress(model, data, arguments.max_eval_windows)
    value = dataclasses.asdict(result) | {"perplexity": result.perplexity, "peak_rss_bytes": peak_resident_bytes()}
    answer(arguments, value, two_columns(arguments.validation_file, readable(value)))
