"""Every reader follows one protocol, and what a path holds decides which one opens it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny_model
from safetensors.torch import save_file
from transformers import PretrainedConfig

from mebp_triton.convert.readers import READERS, open_source, reader_of, state_quantization
from mebp_triton.convert.readers.source import Source

METHODS = [name for name, member in vars(Source).items() if inspect.isfunction(member) and not name.startswith("_")]


@pytest.mark.parametrize(("kind", "name"), READERS, ids=str)
def test_a_reader_in_the_table_follows_the_protocol(kind: str, name: str | None) -> None:
    reader = reader_of(kind, name)
    assert METHODS == ["bind", "read", "has", "save_companions"]
    for method in METHODS:
        wanted = list(inspect.signature(getattr(Source, method)).parameters)
        assert list(inspect.signature(getattr(reader, method)).parameters) == wanted
    if kind == "directory":
        assert reader.quant_method == name


@pytest.mark.parametrize(
    ("quantization", "opened"),
    [
        (None, "SafetensorsDirectory"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "BitsandbytesDirectory"),
        ({"quant_method": "mebp_int4"}, "Int4Directory"),
    ],
)
def test_the_config_names_the_reader_of_a_directory(tmp_path: Path, quantization: Any, opened: str) -> None:
    save_tiny_model("llama", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {} if quantization is None else {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(open_source(str(tmp_path))).__name__ == opened


@pytest.mark.parametrize("method", ["torchao", "fp8", ".gguf", ["bitsandbytes"], {}, 3, None])
def test_a_method_without_a_reader(tmp_path: Path, method: Any) -> None:
    content = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json has a quantization_config .*not supported yet: give the unq"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model"])
def test_any_file_is_taken_for_a_gguf(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 a zip archive")
    with pytest.raises(ValueError, match=f"{name} is not a GGUF file"):
        open_source(tmp_path / name)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing does not exist: .* \(hub names are not fetched\)"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        open_source(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"is a directory of GGUF files: give one of them, such as .*a\.gguf"):
        open_source(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a model: give the directory"):
        open_source(tmp_path / "model.safetensors")


def test_a_store_is_no_source_of_a_store(shared_store: Any) -> None:
    with pytest.raises(ValueError, match="is a store already: train it, or decode it first by `mebp merge"):
        open_source(shared_store("llama"))


@pytest.mark.parametrize(
    ("file", "tensors", "stated"),
    [
        ("quantize_config.json", {}, {"quant_method": "gptq", "bits": 4}),
        (None, {"model.a.W_q": torch.zeros(1)}, {"quant_method": "hqq"}),
        (None, {}, None),
    ],
)
def test_a_config_is_told_what_states_the_quantisation_elsewhere(
    tmp_path: Path, file: str | None, tensors: dict[str, torch.Tensor], stated: Any
) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    if file is not None:
        (tmp_path / file).write_text('{"bits": 4}')
    config = PretrainedConfig()
    state_quantization(config, tmp_path)
    assert getattr(config, "quantization_config", None) == stated
    config = PretrainedConfig(quantization_config={"quant_method": "awq"})
    state_quantization(config, tmp_path)
    assert config.quantization_config == {"quant_method": "awq"}, "config.json comes first"
