"""Configs are read without running code, and those of other models, or out of all proportion, are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from models import tiny_config
from transformers import BartConfig, BertConfig, LlamaConfig, T5Config

from mebp_triton.models.config import check_sizes, prepare_config, read_config, read_json_object, read_store_config


def written(directory: Path, **changes: Any) -> Path:
    """A directory with a Llama's config, in which some settings are others (None: left out)."""
    content = tiny_config("llama").to_dict() | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return directory


def refused(path: Path) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(ValueError) as caught:
        read_config(path, "try another")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_a_config_is_read_from_a_directory_or_a_file(tmp_path: Path) -> None:
    written(tmp_path, attn_implementation="eager")
    for path in (tmp_path, tmp_path / "config.json"):
        config = read_config(path, "")
        assert isinstance(config, LlamaConfig) and config.hidden_size == 48


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, ("'own'", "never run")),
        ({"model_type": "own"}, ("'own'", "is unknown")),
        ({"model_type": None}, ("None",)),
        ({"model_type": ["llama"]}, ("['llama']",)),
        ({"id2label": [1]}, ("config.json is not a usable config", "try another")),
        ({"num_labels": 10**9}, ("num_labels is 1000000000", "try another")),
        ({"num_labels": "3"}, ("num_labels is '3'",)),
        ({"hidden_size": 10**12}, ("hidden_size is 1000000000000", "more than any model has", "try another")),
        ({"intermediate_size": 10**400}, ("intermediate_size",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ({"num_local_experts": 1 << 13}, ("num_local_experts",)),
    ],
    ids=lambda value: str(value)[:50],
)
def test_configs_that_cannot_be_used(tmp_path: Path, changes: Any, words: tuple[str, ...]) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')")
    message = refused(written(tmp_path, **changes))
    assert all(word in message for word in words), message
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "somebody/attention"},
        {"_attn_implementation": "somebody/attention:kernel"},
        {"text_config": {"attn_implementation": "somebody/attention"}},
        {"experts_implementation": {"": "somebody/experts"}},
        {"parts": [{"attn_implementation": "somebody/attention"}]},
    ],
)
def test_settings_that_name_code_on_the_hub(tmp_path: Path, change: Any) -> None:
    message = refused(written(tmp_path, **change))
    assert "names code on the hub, which is never run" in message and "somebody/" in message


def test_files_that_hold_no_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json is missing or not a regular file; give another"):
        read_json_object(file, "give another")
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"config\.json is missing or not a regular file"):
        read_json_object(file, "give another")
    file.unlink()
    for content, message in (
        ("[]", "holds a JSON list, wanted an object; give another"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json_object(file, "give another")
    file.write_text('{"a": 1}')
    assert read_json_object(file, "") == {"a": 1}


# --- beside the weights ---------------------------------------------------------------------------------------------

SHAPES = [(97, 48), (80, 48), (48,)]


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"vocab_size": 8 * 97}, True),
        ({"vocab_size": 8 * 97 + 1}, False),
        ({"num_hidden_layers": 8 * 97}, True),
        ({"num_hidden_layers": 8 * 97 + 1}, False),
        ({"hidden_size": 1 << 20}, False),
    ],
)
def test_a_config_in_proportion_to_the_weights(changes: Any, fits: bool) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**changes))
    if fits:
        return check_sizes("here", config, SHAPES)  # type: ignore[arg-type]
    (name,) = changes
    with pytest.raises(ValueError, match=f"here: {name} is .* more than the weights have: .* do not belong together"):
        check_sizes("here", config, SHAPES)  # type: ignore[arg-type]


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4.57 has no settings of single layers")
def test_settings_of_single_layers_count_as_well() -> None:
    config = tiny_config("gemma4_text", global_head_dim=32)
    check_sizes("here", config, SHAPES)
    with pytest.raises(ValueError, match="here: head_dim is 1024, more than the weights have"):
        check_sizes("here", tiny_config("gemma4_text", global_head_dim=1024), SHAPES)


def test_a_store_without_weights_has_room_for_nothing(tmp_path: Path) -> None:
    store = SimpleNamespace(directory=written(tmp_path), shapes=lambda: SHAPES)
    assert read_store_config(store).vocab_size == 97  # type: ignore[arg-type]
    store.shapes = lambda: []
    with pytest.raises(ValueError, match="more than the weights have"):
        read_store_config(store)  # type: ignore[arg-type]


# --- causal language models alone -----------------------------------------------------------------------------------


def test_the_class_is_named_and_the_origin_is_not() -> None:
    config = LlamaConfig(auto_map={"AutoModelForCausalLM": "code.Model"}, name_or_path="/home/me/model")
    prepared = prepare_config(config, "here")
    assert prepared.architectures == ["LlamaForCausalLM"] and prepared.name_or_path == ""
    assert not hasattr(prepared, "auto_map")
    assert prepare_config(LlamaConfig(architectures=["MyOwnForCausalLM"]), "").architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(), "here: t5 is not a decoder-only language model"),
        (BartConfig(), "here: bart is not a decoder-only language model"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM is not a decoder-only language model"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification is not a"),
        (LlamaConfig(architectures=3), "architectures is 3, wanted a list"),
        (LlamaConfig(architectures=[{}]), r"architectures is \[{}\], wanted a list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_models_of_another_kind(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare_config(config, "here")
