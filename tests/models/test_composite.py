"""Checkpoints of models for text and images load where AutoModelForCausalLM loads them, and train on text as there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    COMPOSITE,
    assert_same,
    batch,
    decoded_model,
    peft_gradients,
    peft_model,
    randomize_adapter,
    save_composite_model,
    step,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import mebp_triton as mebp
from mebp_triton.models.adapter import adapter_layers
from mebp_triton.store.reader import Store

TEXT_ALONE = {
    "qwen3_5": ("Qwen3_5ForCausalLM", "visual"),
    "llama4": ("Llama4ForCausalLM", "multi_modal_projector, visi"),
}
WHOLE = ["gemma3", "gemma4"]
REFUSED = ["mistral3", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def composite(tmp_path_factory: Any) -> Any:
    """A model directory and its store, each made once; the messages of making it."""
    made: dict[str, Any] = {}

    def make(name: str) -> tuple[Path, Path, list[str]]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            save_composite_model(name, root / "model")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                mebp.quantize(root / "model", root / "store", group_size=32)
            said = [str(warning.message) for warning in caught if warning.category is UserWarning]
            made[name] = root / "model", root / "store", [line for line in said if "model:" in line]
        return made[name]

    return make


def test_all_are_tried() -> None:
    assert {*TEXT_ALONE, *WHOLE, *REFUSED} == COMPOSITE.keys()


@pytest.mark.parametrize("name", [*TEXT_ALONE, *WHOLE])
def test_the_model_is_that_of_transformers(composite: Any, name: str) -> None:
    """The same class, tensors and config; what the checkpoint has beside them is counted."""
    model_directory, store, said = composite(name)
    theirs, info = AutoModelForCausalLM.from_pretrained(model_directory, output_loading_info=True)
    ours = decoded_model(store)
    assert type(ours) is type(theirs) and not info["missing_keys"]
    wanted = dict(theirs.named_parameters())
    opened = Store(store)
    assert {name for name, _ in ours.named_parameters()} == wanted.keys()
    for tensor in opened.floats:
        if tensor in wanted:
            assert torch.equal(opened.float_tensor(tensor), wanted[tensor]), tensor
    assert all(info.relative_error < 0.12 for info in opened.matrices.values())
    if name in TEXT_ALONE:
        config, reference = AutoConfig.from_pretrained(store).to_dict(), theirs.config.to_dict()
        changed = {key for key in reference if config.get(key) != reference[key]}
        assert changed <= {"architectures", "transformers_version", "dtype", "_name_or_path"}
        kind, parts = TEXT_ALONE[name]
        others = [key for key in load_file(model_directory / "model.safetensors") if "vis" in key or "projector" in key]
        assert config["architectures"] == [kind] and len(said) == 1
        assert f"{len(others)} tensors" in said[0] and parts in said[0] and "left out" in said[0]
    else:
        assert not said


@pytest.mark.parametrize("name", [*TEXT_ALONE, *WHOLE])
def test_a_step_on_text_gets_the_gradients_of_peft(composite: Any, name: str) -> None:
    """Adapters lie where text goes, and nowhere else; Gemma 4 reads a row of its embedding's weight."""
    _, store, _ = composite(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8))
    said = [str(warning.message) for warning in caught if "text never reaches" in str(warning.message)]
    assert len(said) == (name in WHOLE) and all("vision_tower" in line for line in said)
    assert adapter_layers(model) and not any("vision" in path or "visual" in path for path in adapter_layers(model))
    randomize_adapter(model)
    ours = step(model.eval())
    reference = peft_model(store, model, r=4, lora_alpha=8)
    reference(**batch(), use_cache=False).loss.backward()
    assert_same(ours, dict(peft_gradients(reference)), 1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_layers_that_text_never_reaches_can_be_named(composite: Any, name: str) -> None:
    _, store, _ = composite(name)
    with pytest.warns(UserWarning, match="target_modules names .* text never reaches .*vision_tower"):
        model = mebp.load(
            store, mebp.LoraConfig(r=4, target_modules=r".*vision_tower.*\.fc1|.*q_proj\.linear|.*\.q_proj")
        )
    assert any("vision_tower" in path for path in adapter_layers(model))


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """The message's way out, a checkpoint of a ...ForCausalLM, is what all other tests take."""
    source = save_composite_model(name, tmp_path / "model")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match="is not a decoder-only language model: give one whose architecture") as error:
        mebp.quantize(source, tmp_path / "store")
    assert "\n" not in str(error.value) and not (tmp_path / "store").exists()


def test_settings_of_the_whole_model_hold_for_its_part(tmp_path: Path) -> None:
    """The dtype may stand in the whole model's config alone."""
    source = save_composite_model("qwen3_5", tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    content["text_config"].pop("dtype", None)
    (source / "config.json").write_text(json.dumps(content | {"dtype": "bfloat16"}))
    mebp.quantize(source, tmp_path / "store", group_size=32)
    written = json.loads((tmp_path / "store" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and written["model_type"] == "qwen3_5_text" and "text_config" not in written
