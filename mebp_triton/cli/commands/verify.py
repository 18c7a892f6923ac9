"""``mebp verify``: checks every byte of a store against its checksums."""

from __future__ import annotations

import argparse
from pathlib import Path

from mebp_triton.cli.console import answer, console, progress_bar, two_columns
from mebp_triton.store.manifest import accept_companions
from mebp_triton.store.reader import Store
from mebp_triton.system.units import MIB


def run(arguments: argparse.Namespace) -> None:
    if arguments.accept_changes:
        for name in accept_companions(Path(arguments.store)):
            console.print(f"{name} is taken as it is", highlight=False, soft_wrap=True)
    store = Store(arguments.store)
    with progress_bar("verifying") as update:
        for done, file in enumerate(store.files.values()):
            file.verify(again=True)
            file.mapped.drop()
            update(done + 1, len(store.files))
    value = {"store": arguments.store, "files": len(store.files), "bytes": store.nbytes(), "whole": True}
    rows = {"files": len(store.files), "size": f"{store.nbytes() / MIB:.1f} MiB", "checksums": "all agree"}
    answer(arguments, value, two_columns(arguments.store, rows))
