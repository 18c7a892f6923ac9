"""The tokens at which a model stops: read, added to, and written beside an adapter."""

import json

import pytest
from models import decoded_model

from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import load_adapter, read_adapter_config, save_adapter
from mebp_triton.models.generation import GENERATION_CONFIG, add_stops, saved_stops, stop_ids, write_stops
from mebp_triton.models.load import load


def stated(directory):
    return json.loads((directory / GENERATION_CONFIG).read_text())


def test_an_adapter_keeps_where_its_model_stops(shared_store, tmp_path):
    store = shared_store()
    model = load(store, LoraConfig(r=2))
    assert stop_ids(model) == [2]
    save_adapter(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / GENERATION_CONFIG).exists()
    add_stops(model, [2, 7, 9, 7])
    assert stop_ids(model) == model.generation_config.eos_token_id == [2, 7, 9] and model.mebp.stops == [7, 9]
    save_adapter(model, tmp_path / "adapter")
    # The other settings are the store's.
    assert stated(tmp_path / "adapter") == stated(store) | {"eos_token_id": [2, 7, 9]}
    assert saved_stops(tmp_path / "adapter") == [2, 7, 9] and saved_stops(tmp_path / "plain") == []

    again = load(store, read_adapter_config(tmp_path / "adapter"))
    load_adapter(again, tmp_path / "adapter")
    assert stop_ids(again) == [2, 7, 9]
    save_adapter(again, tmp_path / "again")
    assert stated(tmp_path / "again") == stated(tmp_path / "adapter")
    assert decoded_model(store).generation_config.from_pretrained(tmp_path / "adapter").eos_token_id == [2, 7, 9]


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"eos_token_id": 2, "bos_token_id": None, "hidden_size": 3}, {"eos_token_id": [2, 7]}),
        (
            {"eos_token_id": 1, "text_config": {"eos_token_id": [5, 7], "pad_token_id": 0}},
            {"eos_token_id": [5, 7], "pad_token_id": 0},
        ),
        ({}, {"eos_token_id": [7]}),
    ],
)
def test_a_base_without_a_generation_config(tmp_path, config, written):
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_stops(tmp_path, tmp_path, [7])
    assert stated(tmp_path) == written


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": ["a"]}', '{"eos_token_id": -1}', '{"eos_token_id": [true]}']
)
def test_a_damaged_file(tmp_path, content):
    (tmp_path / GENERATION_CONFIG).write_text(content)
    with pytest.raises(ValueError, match=GENERATION_CONFIG) as caught:
        saved_stops(tmp_path)
    assert "\n" not in str(caught.value)
