"""The seal of an adapter's tensors: what was written is read again, and bases are known by their checksums."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter_seal import WEIGHTS, base_of_adapter, other_base, read_adapter_tensors, write_weights
from mebp_triton.store.manifest import BaseModel
from mebp_triton.system.errors import FileError

BASE = BaseModel("team/model", "0123abc", 7)
TENSORS = {"a": torch.arange(6.0).view(2, 3)}


def store_of(base: BaseModel | None) -> Any:
    return SimpleNamespace(base=base, directory="store")


def test_a_base_is_another_where_both_checksums_are_known_and_differ(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, LoraConfig(), BASE)
    assert (found := base_of_adapter(tmp_path)) == BASE and found.crc32 == 7
    for own in (None, BASE, BaseModel("other"), BaseModel("other", None, 7)):
        assert other_base(tmp_path, store_of(own)) is None
    line = other_base(tmp_path, store_of(BaseModel("other", None, 8)))
    assert line == f"the adapter {tmp_path} was trained on team/model, and store was made of other weights, other"


def test_pefts_files_have_no_seal_and_ours_are_checked(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, LoraConfig(), BASE)
    assert torch.equal(read_adapter_tensors(tmp_path)["a"], TENSORS["a"])
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    assert base_of_adapter(tmp_path) is None and other_base(tmp_path, store_of(BASE)) is None
    save_file(TENSORS, tmp_path / WEIGHTS, metadata={"mebp_seal": "7"})
    with pytest.raises(FileError, match="its mebp_seal is not an object"):
        read_adapter_tensors(tmp_path)
