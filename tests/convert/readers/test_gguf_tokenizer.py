"""Texts get the ids that llama.cpp gives them, and end where it stops; or the user is told.

``bench/gguf_reference.py`` asked llama.cpp; its answers are in ``bench/results/gguf-llama-cpp.json``.
"""

import json

import pytest
import transformers
from sources import ROOT
from transformers import AutoTokenizer, GenerationConfig

from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.gguf_header import Length
from mebp_triton.convert.readers.gguf_tokenizer import check_tokens, token_ids

pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_vocabularies import TEXTS, VOCABULARIES, byte_level, sentencepiece, write_vocabulary  # noqa: E402

NEEDS_5 = {"pre tekken", "pre qwen35", "pre gpt-4o", "no end", "spm without ids", "gemma4"}
REFERENCE = json.loads((ROOT / "bench/results/gguf-llama-cpp.json").read_text())


@pytest.mark.parametrize("name", VOCABULARIES)
def test_texts_get_the_ids_that_llama_cpp_gives_them(name, tmp_path, recwarn):
    if transformers.__version__ < "5" and name in NEEDS_5:
        pytest.skip("transformers 4 does not know the kind of words, or wants a token at the end")
    wanted = REFERENCE["texts"][name]
    path = write_vocabulary(tmp_path / "tiny.gguf", VOCABULARIES[name])
    (tmp_path / "store").mkdir()
    open_source(path).save_companions(tmp_path / "store")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "store")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(tokenizer) == len(VOCABULARIES[name]["tokenizer.ggml.tokens"])
    if name == "pre deepseek-coder":
        assert ids != wanted["ids"]
        assert "tokenizer.ggml.pre is 'deepseek-coder'" in str(recwarn.pop(UserWarning).message)
    else:
        assert ids == wanted["ids"]
    ends: int | list[int] = GenerationConfig.from_pretrained(tmp_path / "store").eos_token_id
    # llama.cpp takes token 11 where a file names no EOS.
    assert set(ends if isinstance(ends, list) else [ends]) == set(wanted["ends"]) - {11}
    assert [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS[3:5]] == TEXTS[
        3:5
    ]


@pytest.mark.parametrize(("text", "kind"), [("<|im_end|>", 3), ("<end_of_turn>", 4), ("</s>", 1)])
def test_tokens_that_end_a_turn_by_their_text(text, kind, tmp_path):
    """As in llama.cpp, which knows some tokens by their text, whatever the file says of their kind."""
    keys = byte_level()
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    keys["tokenizer.ggml.tokens"] = [*tokens[:-2], text, tokens[-1]]
    keys["tokenizer.ggml.token_type"] = [*kinds[:-2], kind, kinds[-1]]
    write_vocabulary(tmp_path / "tiny.gguf", keys)
    (tmp_path / "store").mkdir()
    open_source(tmp_path / "tiny.gguf").save_companions(tmp_path / "store")
    ends = [keys["tokenizer.ggml.eos_token_id"], len(tokens) - 2]
    assert GenerationConfig.from_pretrained(tmp_path / "store").eos_token_id == ends
    assert AutoTokenizer.from_pretrained(tmp_path / "store").eos_token_id == ends[0]


@pytest.mark.parametrize("name", ["bos", "eos", "padding", "unknown", "eot", "eom"])
def test_a_token_that_the_file_does_not_have_is_refused_by_its_key(name):
    metadata = {"tokenizer.ggml.tokens": Length(4), f"tokenizer.ggml.{name}_token_id": 3}
    check_tokens(metadata, "x.gguf")
    for value in (4, -1, 2**32 - 1, "x"):
        metadata[f"tokenizer.ggml.{name}_token_id"] = value
        with pytest.raises(ValueError, match=rf"^x.gguf: tokenizer\.ggml\.{name}_token_id is .* of 4 tokens"):
            check_tokens(metadata, "x.gguf")


def test_the_tokenizer_is_the_files_own(tmp_path):
    """Not that of another model in the same directory."""
    path = write_vocabulary(tmp_path / "tiny.gguf", sentencepiece())
    (tmp_path / "store").mkdir()
    open_source(path).save_companions(tmp_path)
    write_vocabulary(path, byte_level())
    open_source(path).save_companions(tmp_path / "store")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "store")
    assert tokenizer.convert_ids_to_tokens(range(296)) == byte_level()["tokenizer.ggml.tokens"]


def test_tokens_are_texts():
    check_tokens({"tokenizer.ggml.bos_token_id": 7}, "x.gguf")  # no tokenizer
    with pytest.raises(ValueError, match=r"^x.gguf: tokenizer\.ggml\.tokens is \[1, 2\], wanted a list of texts"):
        check_tokens({"tokenizer.ggml.tokens": [1, 2]}, "x.gguf")


def test_ids_that_a_file_does_not_state():
    assert token_ids({"tokenizer.ggml.model": "llama"}) == {"bos_token_id": 1, "eos_token_id": 2}
    assert token_ids({"tokenizer.ggml.model": "gpt2"}) == {}
