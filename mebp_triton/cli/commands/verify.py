"""``mebp verify``: checks every byte of a store against its checksums."""

from __future__ import annotations

import argparse
from pathlib import Path

from mebp_triton.cli.console import answer, progress_bar, say, two_columns
from mebp_triton.system.units import MIB


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="accept the config and tokenizer files beside the weights as they now are",
    )


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.store.manifest import accept_companions
    from mebp_triton.store.reader import Store

    if arguments.accept_changes:
        for name in accept_companions(Path(arguments.store)):
            say(f"{name} is taken as it is")
    store = Store(arguments.store)
    with progress_bar("verifying") as update:
        for done, file in enumerate(store.files.values()):
            file.verify(again=True)
            file.mapped.drop()
            update(done + 1, len(store.files))
    value = {"store": arguments.store, "files": len(store.files), "bytes": store.nbytes(), "whole": True}
    rows = {"files": len(store.files), "size": f"{store.nbytes() / MIB:.1f} MiB", "checksums": "all agree"}
    answer(arguments, value, two_columns(arguments.store, rows))
