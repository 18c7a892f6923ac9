"""The files beside the weights are copied byte for byte, and the config is the one that is given."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mebp_triton.convert.companions import write_companions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "additional_chat_templates").mkdir(parents=True)
    files = {
        "config.json": "{}",
        "generation_config.json": '{"eos_token_id":  2}',
        "tokenizer.json": '{"ä": "\\u00e4"}',
        "tokenizer.model": "\0\1",
        "vocab.txt": "a\r\nb",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "model.safetensors": "weights",
        "README.md": "not a companion",
        "notes.json": "[",
    }
    for name, content in files.items():
        (directory / name).write_bytes(content.encode())
    return directory


def test_files_are_copied_byte_for_byte_and_nothing_else_is(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    os.mkfifo(source / "vocab.json")  # to open it would block for ever
    (source / "tokenizer.2.model").mkdir()
    write_companions({"model_type": "llama", "text": "ä"}, source, target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    expected = {"generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"}
    expected |= {"additional_chat_templates/tool.jinja"}
    assert copied == expected | {"config.json"}
    for name in expected:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    text = (target / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"model_type": "llama", "text": "ä"} and "ä" in text and text.endswith("}\n")


def test_json_that_no_tokenizer_could_read(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON .*; download it again"):
        write_companions({}, source, tmp_path)
