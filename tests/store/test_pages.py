"""Pages of a mapped file: resident while a block runs, and gone after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from models import batch, tiny_store
from stores import BLOCK, flip, one_matrix

import mebp_triton as mebp
from mebp_triton.store.manifest import block_file
from mebp_triton.store.pages import MappedPages, Pages
from mebp_triton.store.reader import Store
from mebp_triton.store.waiting import Waiting
from mebp_triton.system.errors import FileError
from mebp_triton.system.memory import resident


def mapped_pages(directory: Path, rows: int = 64) -> MappedPages:
    return MappedPages(Store(one_matrix(directory, rows, 2048)).files[BLOCK], Waiting())


def test_pages_in_a_mapped_file_are_resident_only_within(tmp_path: Path) -> None:
    pages = mapped_pages(tmp_path, 4096)
    size = pages.file.mapped.size
    with pages:  # the first time, checksums are compared
        pass
    before = resident().file_backed
    pages.prefetch()
    assert resident().file_backed - before < size * 0.05
    with pages:
        with pages:
            pass
        within = resident().file_backed  # leaving the inner one gives nothing back
    assert size > 4 << 20 and within - before >= size * 0.95
    assert resident().file_backed - before < size * 0.05
    assert pages.waiting.pop_seconds() > 0
    assert pages.waiting.pop_paged() == 2 * size, "the inner one brings nothing in"


def test_pages_are_verified_when_they_are_entered_first(tmp_path: Path) -> None:
    pages = mapped_pages(tmp_path)
    flip(tmp_path / BLOCK, -50)
    with pytest.raises(FileError, match="is damaged"), pages:
        pass


def test_weights_that_lie_in_place_need_nothing() -> None:
    pages = Pages()
    pages.prefetch()
    with pages, pages:
        pass


def test_a_model_whose_file_shrinks_while_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    shrinking = tiny_store("llama", tmp_path)
    model: Any = mebp.load(shrinking, mebp.LoraConfig(r=4, lora_alpha=8), weights="file")
    model(**batch()).loss.backward()
    file = shrinking / block_file(2)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="cut short"):
        model(**batch())
