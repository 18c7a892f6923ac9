"""Checkpoints of models for text and images: the language model is trained on text, under the whole model's names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    COMPOSITE,
    assert_same,
    batch,
    decoded_model,
    loaded,
    peft_gradients,
    peft_model,
    randomize_adapter,
    relative_rms,
    save_composite_model,
    step,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import mebp_triton as mebp
from mebp_triton.models.adapter import adapter_layers
from mebp_triton.models.language_part import parts_left_out
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store

# The models whose language model is taken alone, with what is left out of them; and those that are taken whole.
ALONE = {
    "qwen3_5": "visual",
    "llama4": "multi_modal_projector, visi",
    "mistral3": "multi_modal_projector, visi",
    "qwen2_5_vl": "visual",
}
WHOLE = ["gemma3", "gemma4"]


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


def described(config: Any) -> dict[str, Any]:
    """The settings of a config, apart from where it came from and the attention that was chosen."""
    own = {"architectures", "transformers_version", "dtype", "_name_or_path", "_attn_implementation"}

    def without(settings: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in settings.items() if key not in own}
        return {key: without(value) if isinstance(value, dict) else value for key, value in kept.items()}

    return without(config.to_dict())


def test_all_are_tried() -> None:
    assert {*ALONE, *WHOLE} == COMPOSITE.keys()


@pytest.mark.parametrize("name", [*ALONE, *WHOLE])
def test_the_model_is_that_of_transformers(composite: Any, name: str) -> None:
    """The same class, tensors and config; what the checkpoint has beside them is counted."""
    model_directory, store, said = composite(name)
    kind = AutoModelForImageTextToText if name in ALONE else AutoModelForCausalLM
    theirs, info = kind.from_pretrained(model_directory, output_loading_info=True)
    opened = Store(store)
    ours = build_skeleton(AutoConfig.from_pretrained(store), torch.float32)
    assert type(ours) is type(theirs) and not info["missing_keys"]
    wanted = dict(theirs.named_parameters())
    others = {key for key in wanted if "vis" in key or "projector" in key} if name in ALONE else set()
    assert {key for key, _ in ours.named_parameters()} == wanted.keys() - others
    for tensor in opened.floats:
        if tensor in wanted:
            assert torch.equal(opened.float_tensor(tensor), wanted[tensor]), tensor
    assert all(info.relative_error < 0.12 for info in opened.matrices.values())
    config = AutoConfig.from_pretrained(store)
    assert described(config) == described(theirs.config) and config.architectures == [type(theirs).__name__]
    if name in ALONE:
        assert len(said) == 1
        assert f"{len(others)} tensors" in said[0] and ALONE[name] in said[0] and "left out" in said[0]
        assert len(parts_left_out(ours)) == len(ALONE[name].split(", "))
        with pytest.raises(ValueError, match="the language model alone, .* left out: give text"):
            ours.get_submodule(parts_left_out(ours)[0])(torch.zeros(1))
    else:
        assert not said and not parts_left_out(ours)


@pytest.mark.parametrize("name", [*ALONE, *WHOLE])
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


@torch.no_grad()
@pytest.mark.parametrize("name", [*ALONE, "gemma3"])
def test_the_adapter_fits_the_whole_model(composite: Any, tmp_path: Path, name: str) -> None:
    """PEFT loads it there, on the layers of the language model and on no others, and text gets the same logits."""
    _, store, _ = composite(name)
    model = loaded(store, {"target_modules": "all-linear"})
    mebp.save_adapter(model, tmp_path)
    text = {name: tensor for name, tensor in batch(padding=None).items() if name == "input_ids"}
    whole = decoded_model(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of adapters that the file has no values for
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        wrapped = peft.PeftModel.from_pretrained(whole, tmp_path)
    adapted = {key for key, _ in wrapped.named_modules() if key.endswith("lora_A.default")}
    assert len(adapted) == len(adapter_layers(model)) and not any("vis" in key for key in adapted)
    ours = model(**text, use_cache=False, return_logits=True).logits
    assert relative_rms(ours, wrapped(**text, use_cache=False).logits) < 1e-5
    again = mebp.load(store, mebp.read_adapter_config(tmp_path))
    mebp.load_adapter(again, tmp_path)
    assert torch.equal(again(**text, use_cache=False, return_logits=True).logits, ours)


def test_the_language_model_by_itself(tmp_path: Path) -> None:
    """Where ``architectures`` names it, its class and config are taken; the whole config's dtype holds for it."""
    source = save_composite_model("qwen3_5", tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    content["text_config"].pop("dtype", None)
    content |= {"dtype": "bfloat16", "architectures": ["Qwen3_5ForCausalLM"]}
    (source / "config.json").write_text(json.dumps(content))
    mebp.quantize(source, tmp_path / "store", group_size=32)
    written = json.loads((tmp_path / "store" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and written["model_type"] == "qwen3_5_text" and "text_config" not in written


def test_models_of_other_kinds_stay_refused(tmp_path: Path) -> None:
    source = save_composite_model("mistral3", tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | {"architectures": ["Mistral3ForRewards"]}))
    with pytest.raises(ValueError, match="is not a decoder-only language model: give one whose architecture") as error:
        mebp.quantize(source, tmp_path / "store")
    assert "\n" not in str(error.value) and not (tmp_path / "store").exists()
