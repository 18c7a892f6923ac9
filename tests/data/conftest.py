"""Fixtures of the data room's tests."""

import json

import pytest
from texts import byte_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe(eos_token="<|im_end|>", pad_token="<|pad|>")


@pytest.fixture(scope="module")
def bare():
    """No eos, no pad, no chat template."""
    return byte_bpe(chat_template=None)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
