"""The end of an answer: what a chat template writes behind one, and whether the data train it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .template import ANSWER, NEXT, QUESTION, Template
from .text import encode
from .tokenized import CHECKSUM_CHUNK, TokenizedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TurnEnd:
    """The text and tokens that follow an answer in a chat template.

    Attributes:
        tokens: the special tokens behind a conversation's last answer, in order.
        text: all that stands there, without white space at its ends.
        next_tokens: the special tokens between an answer and a question after it.
    """

    tokens: tuple[int, ...]
    text: str
    next_tokens: tuple[int, ...]

    def stop(self, stops: Iterable[int]) -> int | None:
        """The token that ends an answer for a model that stops at ``stops``: one of them, or else the first one.

        Some templates (GLM's) write nothing behind an answer, and the header of the next turn ends it. None where only
        plain text does, or nothing.
        """
        tokens = self.tokens if self.tokens or self.text else self.next_tokens
        return next((token for token in tokens if token in set(stops)), next(iter(tokens), None))


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd | None:
    """Returns what the tokenizer's chat template writes behind an answer; None where none takes a plain chat.

    Raises:
        ValueError: the template leaves answers out.
    """
    if not tokenizer.chat_template:
        return None
    said = [("user", QUESTION), ("assistant", ANSWER), ("user", NEXT)]
    messages = [{"role": role, "content": content} for role, content in said]
    try:
        template = Template.of(tokenizer, {})
        alone, followed = template.render(messages[:2]), template.render(messages)
    except ValueError:  # it may want other messages than these: the rows themselves will show it
        return None
    if ANSWER not in alone:
        raise ValueError("the chat template writes nothing of what an answer says; give another by --chat-template")
    last, between = (text.rpartition(ANSWER)[2] for text in (alone, followed))
    return TurnEnd(_special(tokenizer, last), last.strip(), _special(tokenizer, between.partition(NEXT)[0]))


def _special(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens in a text that were added to the vocabulary, as those of turns are, and no pieces of words."""
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return tuple(token for token in encode(tokenizer, text) if token in added and token != tokenizer.unk_token_id)


def rows_that_train(data: TokenizedData, tokens: Iterable[int]) -> int:
    """How many rows of the file have one of ``tokens`` among what is trained: not as their first, which is given."""
    wanted = np.array(sorted(tokens), np.int32)
    found: set[int] = set()
    for start in range(0, len(data.ids), CHECKSUM_CHUNK):
        part = slice(start, start + CHECKSUM_CHUNK)
        places = np.flatnonzero(np.isin(data.ids[part], wanted) & data.trained[part]) + start
        after = np.searchsorted(data.offsets, places, side="right")  # the rows' numbers, from 1
        found.update(after[places > data.offsets[after - 1]].tolist())
    return len(found)
