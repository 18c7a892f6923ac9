"""Rows as tokens: the keys of a row say of which kind it is, and so which of its tokens are trained.

Rows of ``text`` and of ``messages`` are trained whole, those of ``prompt`` + ``completion`` from the completion on;
``Masking``, and messages and rows themselves, can say otherwise. Other projects' forms are converted first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .chat import Tokens, chat_rows
from .foreign_rows import from_alpaca
from .masking import Masking
from .messages import (
    ROW_KEYS,
    Conversation,
    conversation_of,
    parsed,
    row_switch,
    shown,
    unknown_keys,
    with_parsed_pair,
)
from .template import Template
from .text import encode, split_prompt, with_eos, with_opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_KINDS = (("text",), ("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))
KINDS_WANTED = "'text', 'prompt' and 'completion', 'messages', 'conversations', or 'instruction' and 'output'"
# What rows of chat messages may have beside them, and Alpaca's beside theirs.
CHAT_KEYS = ("tools", "system", "chat_template_kwargs")
ALPACA_KEYS = ("input", "history", *CHAT_KEYS)
# The keys that are looked at. A row may have others, which are counted.
COLUMNS = {key for kind in ROW_KINDS for key in kind} | {*ALPACA_KEYS, *ROW_KEYS}


@dataclass
class TokenizedRow:
    """What became of a row.

    Attributes:
        parts: ids, and for each a byte that is 1 if it is trained and 0 if it is masked: of one row, or of several
            where the chat template rewrites earlier answers.
        chat: whether the chat template wrote it, so that EOS closes it only if the template says so.
        converted: whether it came in another project's form.
        masked_messages: messages that say of themselves that they are not trained.
        shortened_messages: messages that the chat template does not write whole.
        unopened: whether no answer in it stands behind what the chat template writes where one is wanted.
        unused: how often each key had no effect.
    """

    parts: list[Tokens]
    chat: bool = False
    converted: bool = False
    masked_messages: int = 0
    shortened_messages: int = 0
    unopened: bool = False
    unused: Counter[str] = field(default_factory=Counter)


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, row: Any, masking: Masking, head: list[int], date: datetime | None = None
) -> TokenizedRow:
    """Tokenizes a row.

    Args:
        head: the tokenizer's ``opening``, the same for all rows.
        date: see ``Template``.

    Raises:
        ValueError: the row is of no kind, or of one that cannot be masked as wanted.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}  # Arrow gives every row the same keys
    kind = _kind_of(row)
    weight = row_switch(row)
    unused = Counter(key for key in row if key not in kind and not (key in ROW_KEYS and weight is not None))
    alpaca = kind == ("instruction", "output")
    if alpaca:
        row = from_alpaca(row, chat=bool(tokenizer.chat_template))
        kind = ("prompt", "completion")
    if kind == ("prompt", "completion"):
        row = with_parsed_pair(row)
    if kind == ("text",):
        found = TokenizedRow([_text_tokens(tokenizer, row["text"], masking, head)])
    elif kind == ("prompt", "completion") and not isinstance(row["prompt"], list | dict):
        found = TokenizedRow([_prompt_tokens(tokenizer, row, masking, head)])
    else:
        found = _chat_row(tokenizer, row, kind, masking, date)
        unused -= Counter(dict.fromkeys(CHAT_KEYS, 1))
    if alpaca:
        unused -= Counter(dict.fromkeys(("input", "history", "system"), 1))
    if weight is False:  # nothing of the row is trained, and so it is dropped and counted
        found.parts = [(ids, bytes(len(ids))) for ids, _ in found.parts]
    found.converted |= alpaca
    found.unused += unused
    return found


def _kind_of(row: dict[str, Any]) -> tuple[str, ...]:
    kinds = [kind for kind in ROW_KINDS if all(key in row for key in kind)]
    if len(kinds) == 1:
        return kinds[0]
    keys = f"{sorted(row)!r:.300}"
    if not kinds and "chosen" in row and "rejected" in row:
        raise ValueError(
            f"a preference row, with the keys {keys}; this trains on answers, not on preferences: "
            "rename 'chosen' to 'completion' (beside 'prompt') or to 'messages'"
        )
    problem = "row of more than one kind" if kinds else "unknown row"
    raise ValueError(f"{problem}, with the keys {keys} that are not null; give one of {KINDS_WANTED}")


def _text_tokens(tokenizer: PreTrainedTokenizerBase, text: Any, masking: Masking, head: list[int]) -> Tokens:
    if not isinstance(text, str):
        raise ValueError(f"'text' must be a string, got {shown(text)}")
    masking.check_text()
    ids = with_eos(tokenizer, with_opening(head, encode(tokenizer, text)))
    return ids, b"\1" * len(ids)


def _chat_row(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    kind: tuple[str, ...],
    masking: Masking,
    date: datetime | None,
) -> TokenizedRow:
    """Tokenizes messages, or a prompt and a completion of messages."""
    if len(kind) == 1:
        if parsed(row, kind[0]) in ([], None):
            return TokenizedRow([([], b"")], chat=True)  # nothing to train on, as an empty text
        if masking.completion_only_loss:
            raise ValueError(
                "completion_only_loss needs 'prompt' and 'completion', and this row has messages; "
                "assistant_only_loss masks those"
            )
    elif not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        raise ValueError(_two_alike(row))
    template = Template.of(tokenizer, row, date)
    talks = [conversation_of(row | ({} if key == kind[0] else {"system": None}), key) for key in kind]
    given = len(talks[0].messages) if len(talks) == 2 else 0
    messages = [message for talk in talks for message in talk.messages]
    said = talks[0].said | {given + place: trained for place, trained in talks[-1].said.items()}
    parts, shortened, unopened = chat_rows(template, messages, given, said, masking)
    unused = _unused(template, talks, kind)
    if masking.assistant_only_loss:
        roles = [messages[place]["role"] for place, trained in said.items() if trained]
        unused += Counter(f"a weight on a message of {role!r}" for role in roles if role != "assistant")
    converted = kind == ("conversations",) or any(talk.converted for talk in talks)
    masked = sum(not trained for trained in said.values())
    return TokenizedRow(parts, True, converted, masked, shortened, unopened, unused)


def _unused(template: Template, talks: Iterable[Conversation], kind: tuple[str, ...]) -> Counter[str]:
    """Counts what a row gives to the template that the template never mentions."""
    words = template.words
    unused = Counter(f"chat_template_kwargs.{name}" for name in template.arguments if name not in words)
    if template.tools and "tools" not in words:
        unused["tools"] += 1
    for talk, key in zip(talks, kind, strict=True):
        unused += unknown_keys(talk.messages, words, key)
    return unused


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], masking: Masking, head: list[int]
) -> Tokens:
    prompt, completion = row["prompt"], row["completion"]
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise ValueError(_two_alike(row))
    if masking.assistant_only_loss:
        raise ValueError("assistant_only_loss needs chat messages, and this row has strings; completion_only_loss?")
    first, rest = split_prompt(tokenizer, prompt, prompt + completion)
    first = with_opening(head, first)
    ids = with_eos(tokenizer, first + rest)
    masked = 0 if masking.completion_only_loss is False else len(first)
    return ids, b"\0" * masked + b"\1" * (len(ids) - masked)


def _two_alike(row: dict[str, Any]) -> str:
    got = f"{shown(row['prompt'])} and {shown(row['completion'])}"
    return f"'prompt' and 'completion' must be two strings or two lists of messages, got {got}"
