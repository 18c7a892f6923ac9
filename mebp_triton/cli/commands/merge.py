"""``mebp merge``: turns a store and its adapter into a model directory, or into a store again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer, progress_bar, readable, two_columns
from mebp_triton.cli.flags import add_quantization, add_validation
from mebp_triton.kernels.names import FLOAT_NAMES

if TYPE_CHECKING:
    from mebp_triton.data.tokenized import TokenizedData
    from mebp_triton.store.reader import Store


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    parser.add_argument("output", metavar="OUT", help="the directory to make")
    parser.add_argument(
        "--adapter", metavar="DIR", help="adapter in PEFT's format (default: none, the store's decoded weights)"
    )
    parser.add_argument("--dtype", choices=FLOAT_NAMES, help="dtype of the model directory (default: the config's)")
    parser.add_argument(
        "--as-store",
        action="store_true",
        help="make a store: matrices that the adapter changes are quantized again; the next two imply this",
    )
    add_quantization(parser)
    add_validation(parser, required=False, use="show what merging costs: the loss on this text before and after")


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.inference import load_validation
    from mebp_triton.convert.merge import merge, merge_to_store
    from mebp_triton.store.reader import Store
    from mebp_triton.system import atomic

    as_store = arguments.as_store or arguments.scheme is not None or arguments.group_size is not None
    if as_store and arguments.dtype is not None:
        raise ValueError(
            "--dtype makes a model directory, and --as-store, --scheme and --group-size make a store: choose one"
        )
    store, output = Store(arguments.store), Path(arguments.output)  # refuses what is no store before the text is read
    atomic.check_absent(output)
    data = load_validation(store.directory, arguments) if arguments.validation_file is not None else None
    windows = arguments.max_eval_windows
    value: dict[str, Any] = {"output": arguments.output, "adapter": arguments.adapter}
    before = _loss(store, arguments.adapter, data, windows, "evaluating the store") if data is not None else None
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


def _loss(
    store: Store | Path, adapter: str | None, data: TokenizedData, windows: int | None, description: str
) -> float:
    from mebp_triton.cli.inference import evaluate_with_progress, load_for_inference

    return evaluate_with_progress(load_for_inference(store, adapter), data, windows, description).loss


def _plain_loss(directory: Path, dtype: str, data: TokenizedData, windows: int | None) -> float:
    """The loss by transformers alone, in the dtype that was written. The whole model is in memory."""
    import torch
    import transformers

    from mebp_triton.kernels.tables import DTYPES
    from mebp_triton.system.machine import resolve_device
    from mebp_triton.training.evaluation import evaluate, plain_score

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False
    )
    device: Any = torch.device(resolve_device(None))
    return evaluate(model.to(device), data, windows, score=plain_score).loss
