"""Plain text as tokens: piece by piece where that gives the ids of the whole, and cut into windows."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 1 << 16
# Where a text may be cut: after a printable character and a newline, before a letter; or after a newline, before a
# space and a letter. ``_splits_at_cuts`` says why.
CUT = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])|(?<=\n)(?= [A-Za-z])")
# How Llama-3 and Qwen2 split words (they differ in digits); GPT-2's expression is built into ByteLevel.
_LETTERS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLIT_REGEXES = (_LETTERS + r"\p{N}{1,3}" + _REST, _LETTERS + r"\p{N}" + _REST)


def windows(
    tokenizer: PreTrainedTokenizerBase, read: Callable[[int], str], length: int, piece_chars: int = PIECE_CHARS
) -> Iterator[array[int]]:
    """Tokenizes a text, and yields its ids in windows of ``length`` tokens; the last one is shorter.

    Args:
        read: ``read(n)`` returns the next n characters of the text, ``read(-1)`` the rest.
        length: tokens of a window, with those that the tokenizer puts before a text.
        piece_chars: see ``pieces``.
    """
    waiting, head = array("i"), array("i", opening(tokenizer))
    length -= len(head)
    if length < 1:
        raise ValueError(f"max_length {length + len(head)} has no room beside the {len(head)} tokens that begin a text")
    for piece in pieces(tokenizer, read, piece_chars):
        waiting.extend(encode(tokenizer, piece))
        full = len(waiting) // length * length
        yield from (head + waiting[start : start + length] for start in range(0, full, length))
        del waiting[:full]
    if waiting:
        yield head + waiting


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: BOS for Llama and Gemma, mostly none."""
    ids = list(tokenizer("a", return_attention_mask=False)["input_ids"])
    bare = encode(tokenizer, "a")
    places = (place for place in range(len(ids)) if ids[place : place + len(bare)] == bare)
    return ids[: next(places, 0)]


def with_opening(head: list[int], ids: list[int]) -> list[int]:
    """Puts ``head``, the tokenizer's ``opening``, before the ids of a text, unless the text spells it out."""
    return ids if ids[: len(head)] == head else head + ids


def with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Puts the end-of-sequence token behind ids that do not end in it; nothing for a tokenizer that has none."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, with the special tokens that it spells and no others.

    Raises:
        UnicodeError: the text has half a surrogate pair, which JSON can spell.
    """
    text.encode()  # the tokenizer's own error would not say what is wrong
    # Not verbose: it would warn of texts longer than the model's context, and those are cut here.
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def split_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str) -> tuple[list[int], list[int]]:
    """The ids of the prompt, exactly as at inference, and those of the rest of ``whole``.

    The rest is taken from the ids of the whole, since some tokenizers put a space before any text they begin with.
    Where one token of the whole lies across the boundary, the rest is tokenized alone.
    """
    head, ids = encode(tokenizer, prompt), encode(tokenizer, whole)
    if ids[: len(head)] == head:
        return head, ids[len(head) :]
    return head, encode(tokenizer, whole[len(prompt) :])


def pieces(
    tokenizer: PreTrainedTokenizerBase, read: Callable[[int], str], least_chars: int = PIECE_CHARS
) -> Iterator[str]:
    """Cuts a text into pieces of ``least_chars`` characters or more that give the ids of the whole, or not at all.

    A tokenizer takes some 600 bytes of memory a token, so a long text is better not tokenized at once.
    """
    if not _splits_at_cuts(tokenizer):
        if text := read(-1):
            yield text
        return
    text, searched = "", least_chars
    while more := read(least_chars):
        text += more
        while cut := CUT.search(text, searched):
            yield text[: cut.start()]
            text, searched = text[cut.start() :], least_chars
        # Whether the text may be cut at its last characters depends on what follows, so they are searched again.
        searched = max(least_chars, len(text) - 2)
    if text:
        yield text


def _splits_at_cuts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the pre-tokenizer surely splits words at every ``CUT``, so that no token can lie across it.

    The known regular expressions split there. Before the cut, a newline ends a word, whatever follows: a letter, a
    space and a letter, or the end of the text. In ``x\\nY`` the x makes the run of white space the one newline; in
    ``\\n Y`` the last space belongs to Y. After the cut, ``Y`` or `` Y`` begins a word, since no expression takes a
    letter after a newline, and none looks back. ``Digits`` only splits further. NFC does not join a newline, a space or
    a letter to the character before it.
    """
    if not tokenizer.is_fast:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip or token.rstrip or token.single_word or "\n" in token.content or token.content[:1].isalpha():
            return False  # such a token could lie across a cut, or be the Y and leave its space behind
    core: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if core.normalizer and json.loads(core.normalizer.__getstate__())["type"] != "NFC":
        return False
    words: dict[str, Any] = json.loads(core.pre_tokenizer.__getstate__()) if core.pre_tokenizer else {"type": "none"}
    splits = False
    for part in words.get("pretokenizers", [words]):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            splits |= part["use_regex"]
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            if part["pattern"].get("Regex") not in SPLIT_REGEXES:
                return False
            splits = True
        elif part["type"] != "Digits":
            return False
    return splits
