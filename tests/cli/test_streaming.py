"""What is shown while a text is made: never a part of a character, never the beginning of its end."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mebp_triton.cli.streaming import TextStream

PARTS = {"a": "a", "b": "b", "#": "#", "new": "\u0120n", "half": "\u0120\u00c3", "rest": "\u00a9", "<end>": "<end>"}


@pytest.fixture(scope="module")
def tokenizer():
    """Tokens of letters and bytes: ``half`` and ``rest`` are a space and the two bytes of an é."""
    core = Tokenizer(WordLevel({text: index for index, text in enumerate(PARTS.values())}, unk_token="a"))
    core.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def streamed(tokenizer, names, **options):
    """The parts that are shown, the stream, and after how many tokens it was ended."""
    shown, ended = [], None
    stream = TextStream(tokenizer, show=shown.append, **options)
    stream.put(torch.tensor([[0, 0]]))
    for place, name in enumerate(names, start=1):
        stream.put(torch.tensor([list(PARTS).index(name)]))
        if bool(stream.is_ended(torch.zeros(1, 1), None)):
            ended = place
            break
    stream.end()
    return shown, stream, ended


def test_every_token_is_shown_at_once(tokenizer):
    shown, stream, ended = streamed(tokenizer, ["a", "b", "new", "a"])
    assert shown == ["a", "b", " n", "a"] and stream.text == "ab na" and ended is None
    assert len(stream.ids) == len(stream.times) == 4 and stream.times == sorted(stream.times)


def test_half_a_character_waits_for_the_rest(tokenizer):
    assert streamed(tokenizer, ["a", "half", "rest", "b"])[0] == ["a", " ", "é", "b"]
    assert streamed(tokenizer, ["a", "half"])[0] == ["a", " ", "\N{REPLACEMENT CHARACTER}"]  # nothing comes any more


def test_the_end_is_no_part_of_the_text(tokenizer):
    assert streamed(tokenizer, ["a", "<end>"], stops=[6])[0] == ["a"]
    shown, stream, ended = streamed(tokenizer, ["a", "#", "a", "#", "#", "b", "a"], ends=["##b"])
    assert shown == ["a", "#a"] and stream.text == "a#a" and ended == 6
    shown, stream, ended = streamed(tokenizer, ["a", "#", "#"], ends=["##b"])  # its beginning, and nothing more
    assert "".join(shown) == stream.text == "a##" and ended is None
    for ends in (["##", "##b", "bb"], ["bb", "##b", "##"]):  # the first that comes, in whatever order they are given
        shown, stream, ended = streamed(tokenizer, ["a", "#", "b", "#", "#", "b"], ends=ends)
        assert "".join(shown) == stream.text == "a#b" and ended == 5


def test_no_space_that_was_shown_is_taken_back(tokenizer):
    """Some tokenizers clean up, and so remove the spaces before "n't" and punctuation marks."""
    core = Tokenizer(WordLevel({"a": 0, "\u0120n": 1, "'t": 2, "\u0120.": 3}, unk_token="a"))
    core.decoder = ByteLevel()
    cleaning = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=True)
    shown: list[str] = []
    stream = TextStream(cleaning, show=shown.append)
    for ids in ([[0, 0]], [0], [1], [2], [3], [0]):
        stream.put(torch.tensor(ids))
    stream.end()
    assert "".join(shown) == stream.text == "a n't .a"
