"""What commands load: a tokenizer, a config, a validation text, and a model with its adapter."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import put
from runs import sentences

from mebp_triton.cli import inference
from mebp_triton.training.evaluation import evaluate


def arguments(path, **options):
    defaults = {"max_length": 24, "completion_only_loss": None, "assistant_only_loss": False, "adapter": None}
    return argparse.Namespace(validation_file=str(path), **(defaults | options))


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_what_a_library_prints_is_no_part_of_the_answer(world, tmp_path, capfd):
    """tokenizers writes to standard output, past Python, that it ignores a key."""
    shutil.copytree(world / "store", tmp_path / "store")
    text = (tmp_path / "store" / "tokenizer.json").read_text()
    put(tmp_path / "store", "tokenizer.json", text.replace('"normalized"', '"normalised": true, "normalized"', 1))
    assert inference.load_tokenizer(tmp_path / "store")("the").input_ids
    os.write(1, b"the answer\n")
    out, err = capfd.readouterr()
    assert out == "the answer\n" and "normalised" in err


def test_a_closed_standard_output_does_no_harm(world):
    kept = os.dup(1)
    os.close(1)
    try:
        assert inference.load_tokenizer(world / "store")("the").input_ids
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_a_tokenizer_that_cannot_be_used_is_one_line(world, tmp_path):
    with pytest.raises(ValueError, match="has no usable tokenizer.*put the model's tokenizer files there"):
        inference.load_tokenizer(tmp_path)
    text = json.loads((world / "store" / "tokenizer.json").read_text())
    text["model"] |= {"vocab": {"the": 0}, "unk_token": "the"}
    text["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}
    text["added_tokens"] = []
    put(tmp_path, "tokenizer.json", json.dumps(text))
    with pytest.raises(ValueError, match="it turns the letter a into no token"):
        inference.load_tokenizer(tmp_path)


# --- configs --------------------------------------------------------------------------------------------------------


def test_a_config_of_a_directory_or_file(world):
    for given in (world / "model", world / "store", world / "store" / "config.json"):
        assert inference.model_config(given).model_type == "llama"


def test_what_has_no_config_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="give a transformers model directory or its config.json"):
        inference.model_config(tmp_path)
    with pytest.raises(ValueError, match=r"a.gguf is a GGUF file: `mebp quantize` it, and give the store"):
        inference.model_config(put(tmp_path, "a.gguf", "GGUF"))


def test_a_window_that_is_too_long(world):
    inference.check_length(world / "store", 64)
    with pytest.raises(ValueError, match="max_length 65 is longer than the 64 tokens that the model takes"):
        inference.check_length(world / "store", 65)


# --- texts and models -----------------------------------------------------------------------------------------------


def test_a_validation_text_is_masked_as_the_flags_say(world, tmp_path):
    talk = [{"prompt": sentences(1, place).strip(), "completion": sentences(1, place + 9)} for place in range(3)]
    path = put(tmp_path, "valid.jsonl", "".join(json.dumps(row) + "\n" for row in talk))
    masked, whole = (
        inference.load_validation(world / "store", arguments(path, completion_only_loss=only)) for only in (None, False)
    )
    assert len(masked) == len(whole) == 3 and sum(masked.trained) < sum(whole.trained) == len(whole.trained)
    by_directory = inference.load_validation(world / "store", arguments(tmp_path))
    assert (by_directory.ids == masked.ids).all() and (by_directory.trained == masked.trained).all()


def test_mistakes_of_a_validation_text(world, tmp_path):
    with pytest.raises(ValueError, match="validation-file .*none.txt: no such file"):  # before its length is looked at
        inference.load_validation(world / "store", arguments(tmp_path / "none.txt", max_length=512))
    with pytest.raises(ValueError, match="max_length 512 is longer"):
        inference.load_validation(world / "store", arguments(world / "held-out.txt", max_length=512))
    with pytest.raises(ValueError, match="validation-file .*a.txt: nothing to evaluate"):
        inference.load_validation(world / "store", arguments(put(tmp_path, "a.txt", "")))


def activations(model):
    return model.get_input_embeddings()(torch.tensor([[4]])).dtype


def test_a_model_with_and_without_its_adapter(world):
    data = inference.load_validation(world / "store", arguments(world / "held-out.txt"))
    adapter = str(world / "run" / "adapter")
    record = json.loads((world / "run" / "run.json").read_text())
    seen = []
    for directory, name in ((None, "loss_before"), (adapter, "loss_after")):
        model = inference.load_for_inference(world / "store", directory, device="cpu")
        result = inference.evaluate_with_progress(model, data, None, "evaluating")
        assert result == evaluate(model, data) and result.loss == record[name]
        seen.append(model)
    assert not seen[0].training and activations(seen[0]) == torch.float32
    half = inference.load_for_inference(Path(world / "store"), adapter, "cpu", "bfloat16", "panel")
    assert activations(half) == torch.bfloat16 and half.mebp.backend == "panel"
