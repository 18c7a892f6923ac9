"""The parts that a store leaves out come from the checkpoint that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, loaded, relative_rms, save_composite_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import mebp_triton as mebp
from mebp_triton.convert.merge import merge
from mebp_triton.convert.other_parts import OtherParts
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store


def made(directory: Path) -> tuple[Path, Path]:
    """A checkpoint of a model for text and images, and its store."""
    source = save_composite_model("qwen2_5_vl", directory / "model")
    mebp.quantize(source, directory / "store", group_size=32)
    return source, directory / "store"


@torch.no_grad()
def test_merging_takes_the_other_parts_from_the_checkpoint(tmp_path: Path) -> None:
    directory, store = made(tmp_path)
    (directory / "preprocessor_config.json").write_text("{}")
    model = loaded(store)
    mebp.save_adapter(model, tmp_path / "adapter")
    merge(store, tmp_path / "merged", tmp_path / "adapter", "float32")
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original = AutoModelForImageTextToText.from_pretrained(directory).model.visual.state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in merged.model.visual.state_dict().items())
    ids = batch(padding=None)["input_ids"]
    truth = model(input_ids=ids, use_cache=False, return_logits=True).logits
    assert relative_rms(merged(input_ids=ids, use_cache=False).logits, truth) < 1e-5


def test_a_checkpoint_that_merging_needs_and_that_is_gone(tmp_path: Path) -> None:
    source, store = made(tmp_path)
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are others than those that it was made of"):
        merge(store, tmp_path / "merged")
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not there to take the rest from: put it back, or merge .* by PEFT"):
        merge(store, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_language_model_alone_has_none(shared_store: Any) -> None:
    assert not OtherParts(Store(shared_store("llama")), build_skeleton(tiny_config("llama"), torch.float32)).shapes
