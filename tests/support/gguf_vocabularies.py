"""GGUF files that differ in how they split, begin and end texts. ``bench/gguf_reference.py`` asks llama.cpp for ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import alphabet
from gguf_models import MODELS, VOCAB, keys_of

MERGES = [
    *("1 2", "12 3", "3 4", "Ġ 1", "Ġ a", "a ,", "Ġ Ġ", "ĠĠ Ġ", "Ċ Ċ", "č Ċ", "* *", "Ġ *", ") :", "' t", "' T", "n '"),
    *(
        "t h",
        "th e",
        "D O",
        "Ġ D",
        "d e",
        "Ġ (",
        "Ġ |",
        ". 1",
        "! ĊĊ",
        "! Ċ",
        "% $",
        "Ĥ ¬",
        "Ã ¼",
        "c Ã¼",
        "_ x",
        "Ġ Ċ",
    ),
    *("x * *", "Ġ =", "0 0", "a Ġ", "Ċ ĉ", "ĉ a", "e , 1"),
]
MERGES = [merge for merge in MERGES if merge.count(" ") == 1]
TEXTS = [
    "the DON'T don't 12345 1 a, x**2 100,000 3.14",
    "  two  spaces\n\n\tand  tabs \r\n\r\n   def f(x):\n    return x",
    "Ünïcücö 日本語 ½ €5 !!\n\n?! a|b % $ ~_x",
    "",
    " a ",
    "<|eot|>the<|end|> a",
]
PRE = ["smollm", "starcoder", "command-r", "gpt-2", "default", "llama-bpe", "qwen2", "stablelm2", "falcon", "bloom"]
PRE += ["tekken", "deepseek-coder", "qwen35", "gpt-4o", "deepseek-v3", "refact", None]
CONTROL = {"<|end|>": 0, "<|eot|>": 1, "<|pad|>": 2}


def byte_level(**changed: Any) -> dict[str, Any]:
    tokens = [*alphabet(), *("".join(merge.split()) for merge in MERGES), *CONTROL]
    tokens = list(dict.fromkeys(tokens))
    first = len(tokens) - len(CONTROL)
    plain = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * first + [3] * len(CONTROL),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": first + 2,
        "tokenizer.ggml.eos_token_id": first,
    }
    return plain | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


def sentencepiece(**changed: Any) -> dict[str, Any]:
    pieces = [
        "▁",
        "▁a",
        "▁the",
        "th",
        "the",
        "he",
        "t",
        "h",
        "e",
        "a",
        "d",
        "o",
        "n",
        "'",
        "▁t",
        "▁th",
        "▁▁",
        "1",
        "2",
        "12",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    plain = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return plain | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


def gemma4(**changed: Any) -> dict[str, Any]:
    """Pieces with merges, spaces as "▁", and bytes for what has no piece."""
    merges = ["t h", "th e", "▁ a", "▁ the", "1 2", "▁ ▁", "▁▁ ▁", "d o", "\n \n"]
    letters = ["▁", "\n", *"thedaon'12,*x."]
    pieces = [*letters, *("".join(merge.split(" ")) for merge in merges)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    plain = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }
    return plain | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


END, EOT = len(byte_level()["tokenizer.ggml.tokens"]) - 3, len(byte_level()["tokenizer.ggml.tokens"]) - 2
VOCABULARIES: dict[str, dict[str, Any]] = {f"pre {pre}": byte_level(pre=pre) for pre in PRE} | {
    "begins": byte_level(add_bos_token=True),
    "begins not": byte_level(pre="llama-bpe", add_bos_token=False),
    "ends": byte_level(add_eos_token=True),
    "begins and ends": byte_level(add_bos_token=True, add_eos_token=True),
    "eot": byte_level(eot_token_id=EOT),
    "eom": byte_level(eom_token_id=EOT),
    "no end": byte_level(eos_token_id=None),
    "spm": sentencepiece(),
    "spm begins not": sentencepiece(add_bos_token=False),
    "spm ends": sentencepiece(add_eos_token=True),
    "spm without prefix": sentencepiece(add_space_prefix=False),
    "spm with prefix": sentencepiece(add_space_prefix=True),
    "spm without ids": sentencepiece(bos_token_id=None, eos_token_id=None),
    "gemma4": gemma4(),
}


def write_vocabulary(path: Path, keys: dict[str, Any]) -> Path:
    """Writes a tiny Llama with the tokenizer that ``keys`` describe."""
    writer = gguf.GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[list] = writer.add_array
    for key, value in {f"llama.{key}": value for key, value in keys_of("llama").items()}.items():
        add[type(value)](key, value)
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    size = len(keys["tokenizer.ggml.tokens"])
    for name, shape in MODELS["llama"].items():
        writer.add_tensor(name, np.ones([size if length == VOCAB else length for length in shape], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
