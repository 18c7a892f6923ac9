"""Plain text: windows are the whole text, and pieces have the ids of the whole."""

import io
import json

import numpy as np
import pytest
from texts import SENTENCES, byte_bpe, encode, rows, text_data
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mebp_triton.data.loading import load_data
from mebp_triton.data.text import SPLIT_REGEXES, opening, pieces, windows, with_opening


@pytest.mark.parametrize("tail", [0, 1, 2, 7])
def test_txt_windows_are_the_whole_text_in_order(tokenizer, write, tail):
    data = text_data(tokenizer, write, 3 * 8 + tail, 8)
    ids = encode(tokenizer, (" ".join(SENTENCES) * 20))[: 3 * 8 + tail]
    kept = 24 + (tail if tail >= 2 else 0)
    assert [token for row, _ in rows(data) for token in row] == ids[:kept]
    assert [len(row) for row, _ in rows(data)] == [8, 8, 8] + [tail] * (tail >= 2)
    assert all(ids == labels for ids, labels in rows(data))
    report = data.report
    assert (report.rows, report.tokens, report.dropped_rows, report.truncated_rows) == (len(data), kept, tail == 1, 0)
    assert report.trained_tokens == kept - len(data)


def test_txt_is_tokenised_whole_and_every_window_begins_as_the_tokenizer_begins_a_text(write):
    # A pre-tokeniser that joins lines, and a post-processor that adds tokens before and after.
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a\nb": 1, "[BOS]": 2}, unk_token="[UNK]"))
    core.post_processor = TemplateProcessing(single="[BOS] $A [BOS]", special_tokens=[("[BOS]", 2)])
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[BOS]")
    assert encode(tokenizer, "a\nb") == [1] and tokenizer("a\nb")["input_ids"] == [2, 1, 2]
    assert opening(tokenizer) == [2] and with_opening([2], encode(tokenizer, "a\nb")) == [2, 1]
    assert rows(load_data(write("x.txt", "a\nb a\nb"), tokenizer, 8)) == [([2, 1, 1], [2, 1, 1])]
    assert [ids for ids, _ in rows(load_data(write("x.txt", " ".join(["a\nb"] * 5)), tokenizer, 3))] == [
        [2, 1, 1],
        [2, 1, 1],
        [2, 1],
    ]


def test_a_text_that_spells_its_beginning_gets_no_second_one():
    tokenizer = byte_bpe(bos_token="<|pad|>")
    assert opening(tokenizer) == []
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|pad|>")
    assert opening(tokenizer) == [2]
    assert (
        with_opening([2], encode(tokenizer, "<|pad|>cat"))
        == with_opening([2], encode(tokenizer, "cat"))
        == [2, *encode(tokenizer, "cat")]
    )
    assert with_opening([2], encode(tokenizer, "")) == [2]


def test_windows_with_no_room_beside_the_beginning(write):
    tokenizer = byte_bpe()
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single="<|pad|> <|pad|> $A", special_tokens=[("<|pad|>", 2)])
    with pytest.raises(ValueError, match="max_length 2 has no room beside the 2 tokens that begin a text"):
        load_data(write("x.txt", "the cat"), PreTrainedTokenizerFast(tokenizer_object=core), 2)


def with_pre_tokenizer(tokenizer, pre_tokenizer, normalizer=None, added=()):
    """The same vocabulary behind another pre-tokeniser."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizer
    core.add_tokens(list(added))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer  # transformers 4 resets add_prefix_space when it is built
    return tokenizer


def byte_level(regex=None, prefix=False):
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTTABLE = {
    "gpt2": (byte_level(),),
    "llama3": (byte_level(SPLIT_REGEXES[0]),),
    "qwen2": (byte_level(SPLIT_REGEXES[1]), normalizers.NFC()),
    "smollm2": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),),
}


ATOMS = [*"\n\n\naB1. \t\u0301\u00e9\x1c\u3000中 ", "'s", "23", "!?", "  ", "\r\n"]


@pytest.fixture(scope="module")
def greedy():
    """Byte BPE that joins whatever its pre-tokeniser lets it, newlines and letters too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([first + second for first in ATOMS for second in ATOMS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def awkward_text(seed, length):
    return "".join(np.random.default_rng(seed).choice(ATOMS, length))


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_text_in_pieces_has_the_ids_of_the_whole(greedy, write, name):
    tokenizer = with_pre_tokenizer(greedy, *CUTTABLE[name])
    text = awkward_text(99, 20_000)
    assert len(list(pieces(tokenizer, io.StringIO(text).read, 1))) > 100
    path = write("x.txt", text)
    text = path.read_text(encoding="utf-8")  # which makes one newline of \r\n
    found = windows(tokenizer, io.StringIO(text).read, 10**6, piece_chars=1)
    assert [list(ids) for ids in found] == [encode(tokenizer, text)] == [load_data(path, tokenizer, 10**6).ids.tolist()]


@pytest.mark.parametrize(
    "parts",
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),),
        (byte_level(prefix=True),),
        (byte_level(r"\s*[^\s]+"),),
        (pre_tokenizers.Metaspace(),),
        (pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), byte_level()]),),
        (None,),
        (byte_level(), normalizers.Prepend("_")),
        (byte_level(), None, [AddedToken("<x>", lstrip=True)]),
        (byte_level(), None, [AddedToken("<x>", rstrip=True)]),
        (byte_level(), None, [AddedToken("1b", single_word=True)]),
        (byte_level(), None, [AddedToken(".\nB")]),
        (byte_level(), None, [AddedToken("Be")]),
    ],
)
def test_other_tokenizers_get_the_text_whole(greedy, parts):
    tokenizer = with_pre_tokenizer(greedy, *parts)
    assert list(pieces(tokenizer, io.StringIO("a.\nB.\nB <x>").read, 1)) == ["a.\nB.\nB <x>"]


def test_byte_order_mark_is_no_text(tokenizer, write):
    plain = rows(load_data(write("a.txt", "The cat sat"), tokenizer, 8))
    assert rows(load_data(write("b.txt", b"\xef\xbb\xbfThe cat sat"), tokenizer, 8)) == plain
    line = json.dumps({"text": "The cat sat"}).encode()
    assert rows(load_data(write("c.jsonl", b"\xef\xbb\xbf" + line), tokenizer, 99)) == rows(
        load_data(write("d.jsonl", line), tokenizer, 99)
    )


def test_text_longer_than_the_models_context_is_no_warning(tokenizer, write, caplog):
    short = byte_bpe(eos_token="<|im_end|>", model_max_length=4)
    load_data(write("x.txt", " ".join(SENTENCES)), short, 4)
    assert not caplog.records
