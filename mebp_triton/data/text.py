"""Plain text: tokenised as one, piece by piece where that gives the same ids, and cut into windows."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PIECE_CHARS = 1 << 16
CUT = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])|(?<=\n)(?= [A-Za-z])")
# Llama-3's and Qwen2's way to part words (they differ in digits); GPT-2's is built into ByteLevel.
_LETTERS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLIT_REGEXES = (_LETTERS + r"\p{N}{1,3}" + _REST, _LETTERS + r"\p{N}" + _REST)


def windows(tokenizer: PreTrainedTokenizerBase, read: Callable[[int], str], length: int) -> Iterator[array[int]]:
    """Ids of a text in windows of ``length`` tokens, the last one shorter. ``read(n)`` gives its next n characters.

    Each begins as the tokenizer begins a text.
    """
    waiting, head = array("i"), array("i", opening(tokenizer))
    length -= len(head)
    if length < 1:
        raise ValueError(f"max-length {length + len(head)} has no room beside the {len(head)} tokens that begin a text")
    for piece in _pieces(tokenizer, read):
        waiting.extend(encode(tokenizer, piece))
        full = len(waiting) // length * length
        yield from (head + waiting[start : start + length] for start in range(0, full, length))
        del waiting[:full]
    if waiting:
        yield head + waiting


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: the BOS of Llama and Gemma, mostly none."""
    ids = list(tokenizer("a", return_attention_mask=False)["input_ids"])
    bare = encode(tokenizer, "a")
    places = (place for place in range(len(ids)) if ids[place : place + len(bare)] == bare)
    return ids[: next(places, 0)]


def opened(ids: list[int], head: list[int]) -> list[int]:
    """Ids of a text as the model is given it: after ``head``, the ``opening``, unless the text spells that out."""
    return ids if ids[: len(head)] == head else head + ids


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, without any special token that it does not spell. UnicodeError for half a surrogate pair."""
    text.encode()  # JSON can spell half a surrogate pair, and the error here says so
    # Not verbose: it warns of texts longer than the model's context, and those are cut here.
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _pieces(tokenizer: PreTrainedTokenizerBase, read: Callable[[int], str]) -> Iterator[str]:
    """Cuts a text where that does not change its ids, or not at all: a tokeniser needs some 600 bytes a token."""
    if not _splits_at_cuts(tokenizer):
        if text := read(-1):
            yield text
        return
    text, searched = "", PIECE_CHARS
    while more := read(PIECE_CHARS):
        text += more
        while cut := CUT.search(text, searched):
            yield text[: cut.start()]
            text, searched = text[cut.start() :], PIECE_CHARS
        # What decides about a cut are the two characters before it, and the two after it.
        searched = max(PIECE_CHARS, len(text) - 2)
    if text:
        yield text


def _splits_at_cuts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every ``CUT`` is certain to part two words of the pre-tokeniser, so that no token can span it.

    How the known regular expressions see a cut: newlines end a word, whether a letter, a space and a letter, or
    nothing follows (for ``x\\nY`` the run of spaces is the one newline, hence the x; of ``\\n Y`` the last space goes
    with Y). Y or `` Y`` starts a word: none takes a letter after a newline, and none looks back. Digits only splits
    further. NFC joins neither a newline, a space nor a letter to what stands before it.
    """
    if not tokenizer.is_fast:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip or token.rstrip or token.single_word or "\n" in token.content or token.content[:1].isalpha():
            return False  # it could span a cut, or be the Y and leave its space behind
    core: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if core.normalizer and json.loads(core.normalizer.__getstate__())["type"] != "NFC":
        return False
    words: dict[str, Any] = json.loads(core.pre_tokenizer.__getstate__()) if core.pre_tokenizer else {"type": "none"}
    parted = False
    for part in words.get("pretokenizers", [words]):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            parted |= part["use_regex"]
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            if part["pattern"].get("Regex") not in SPLIT_REGEXES:
                return False
            parted = True
        elif part["type"] != "Digits":
            return False
    return parted


def split_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt exactly as at inference, and of what follows it.

    What follows is read off the whole, since some tokenisers put a space before any text they start on. Where a token
    of the whole straddles the boundary that cannot be, and the rest is tokenised alone.
    """
    head, ids = encode(tokenizer, prompt), encode(tokenizer, whole)
    if ids[: len(head)] == head:
        return head, ids[len(head) :]
    return head, encode(tokenizer, whole[len(prompt) :])


def with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
