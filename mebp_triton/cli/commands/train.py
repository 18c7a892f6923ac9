"""``mebp train``: fine-tunes a store, or a model that is quantized first."""

from __future__ import annotations

import argparse

from mebp_triton.cli.console import answer, console, readable, two_columns
from mebp_triton.cli.flags import add_quantization, add_settings
from mebp_triton.training.settings import NEEDED, TrainConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store, a model directory or a .gguf file")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of these settings; flags win")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output-dir")
    parser.add_argument("--resume-from-checkpoint", metavar="DIR", help="continue from this checkpoint directory")
    add_settings(parser, TrainConfig, NEEDED)
    add_quantization(parser)


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.training_run import train
    from mebp_triton.system.errors import Interrupted
    from mebp_triton.training.processes import joined

    with joined(arguments.debug) as processes:
        console().quiet = not processes.is_first
        directory, ended = train(arguments, processes)
    if isinstance(ended, Interrupted):
        raise ended if processes.is_first else SystemExit(128 + ended.number)
    if processes.is_first:
        answer(arguments, ended, two_columns(str(directory), readable(ended)))
