"""Where weights are put: every place gives the module the same weight, and verifies it first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stores import BLOCK, WEIGHTS, flip

from mebp_triton.kernels.reference import decode
from mebp_triton.store.arena import ArenaPages, Stager
from mebp_triton.store.manifest import SHARED
from mebp_triton.store.pages import MappedPages, Pages
from mebp_triton.store.placement import host_copy, place_weights
from mebp_triton.store.reader import Store
from mebp_triton.store.waiting import Waiting
from mebp_triton.system.errors import FileError

CPU = torch.device("cpu")


class Holder:
    """In place of a module: keeps the weight that it is given."""

    def set_int4(self, weight: Any) -> None:
        self.weight = weight


def placed(directory: Path, residency: Any, staged: bool) -> tuple[Pages, dict[str, Holder], Store]:
    store, waiting = Store(directory), Waiting()
    holders = {name: Holder() for name in WEIGHTS}
    stager = Stager(CPU, waiting, store.files[BLOCK].data().numel()) if staged else None
    return place_weights(store, BLOCK, holders, residency, CPU, stager, waiting), holders, store


@pytest.mark.parametrize(
    ("residency", "staged", "kind"),
    [
        ("device", False, Pages),
        ("host", False, Pages),  # on a CPU, host memory is the device's
        ("file", False, MappedPages),
        ("host", True, ArenaPages),
        ("file", True, ArenaPages),
    ],
)
def test_every_place_holds_the_same_weights(golden: Path, residency: Any, staged: bool, kind: type) -> None:
    pages, holders, store = placed(golden, residency, staged)
    assert type(pages) is kind
    mapped = range(store.files[BLOCK].data().data_ptr(), store.files[BLOCK].data().data_ptr() + (1 << 30))
    for _ in range(2):
        with pages:
            for name, weight in WEIGHTS.items():
                assert torch.equal(decode(holders[name].weight), decode(weight))
                assert (holders[name].weight.packed.data_ptr() in mapped) == (kind is MappedPages)
        if staged:
            assert all(holder.weight.device.type == "meta" for holder in holders.values())


@pytest.mark.parametrize(("residency", "staged"), [("device", False), ("host", True), ("file", False), ("file", True)])
def test_a_flipped_bit_is_found_before_the_first_use(copied: Path, residency: Any, staged: bool) -> None:
    flip(copied / BLOCK, -5)
    with pytest.raises(FileError, match="block-00000.* is damaged"), placed(copied, residency, staged)[0]:
        pass


def test_a_host_copy_is_verified(copied: Path) -> None:
    """The embedding's file may have no other reader."""
    opened = Store(copied)
    assert torch.equal(host_copy(opened.files[SHARED], CPU), opened.files[SHARED].data())
    flip(copied / SHARED, -2)
    with pytest.raises(FileError, match="is damaged"):
        host_copy(Store(copied).files[SHARED], CPU)
