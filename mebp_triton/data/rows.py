"""Rows as tokens: the keys of a row say of which kind it is, and so which of its tokens are trained.

Rows of ``text`` and of ``messages`` are trained whole, those of ``prompt`` + ``completion`` from the completion on;
``Masking`` can say otherwise. ShareGPT's and Alpaca's rows are converted first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .chat import chat_row, messages_of, shown
from .foreign_rows import from_alpaca, from_sharegpt
from .masking import Masking
from .text import encode, split_prompt, with_eos, with_opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_KINDS = (("text",), ("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))
KINDS_WANTED = "'text', 'prompt' and 'completion', 'messages', 'conversations', or 'instruction' and 'output'"
# The keys that are looked at; a row may have others.
COLUMNS = {key for kind in ROW_KINDS for key in kind} | {"tools", "system", "input", "history"}

Tokens = tuple[list[int], bytes]  # ids, and for each 1 if it is trained and 0 if it is masked


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, row: Any, masking: Masking, head: list[int]
) -> tuple[list[int], bytes, bool]:
    """Tokenizes a row.

    Args:
        head: the tokenizer's ``opening``, the same for all rows.

    Returns:
        The ids; for each, a byte that is 1 if it is trained and 0 if it is masked; whether the row was converted.

    Raises:
        ValueError: the row is of no kind, or of one that cannot be masked as wanted.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}  # Arrow gives every row the same keys
    kind = _kind_of(row)
    converted = kind in (("conversations",), ("instruction", "output"))
    if kind == ("conversations",):
        row = from_sharegpt(row)
    elif kind == ("instruction", "output"):
        row = from_alpaca(row, chat=bool(tokenizer.chat_template))
    if "text" in row:
        return *_text_tokens(tokenizer, row["text"], masking, head), converted
    if "messages" in row:
        return *_message_tokens(tokenizer, row, masking), converted
    return *_prompt_tokens(tokenizer, row, masking, head), converted


def _kind_of(row: dict[str, Any]) -> tuple[str, ...]:
    kinds = [kind for kind in ROW_KINDS if all(key in row for key in kind)]
    if len(kinds) != 1:
        problem = "row of more than one kind" if kinds else "unknown row"
        keys = f"{sorted(row)!r:.300}"
        raise ValueError(f"{problem}, with the keys {keys} that are not null; give one of {KINDS_WANTED}")
    return kinds[0]


def _text_tokens(tokenizer: PreTrainedTokenizerBase, text: Any, masking: Masking, head: list[int]) -> Tokens:
    if not isinstance(text, str):
        raise ValueError(f"'text' must be a string, got {shown(text)}")
    masking.check_text()
    ids = with_eos(tokenizer, with_opening(head, encode(tokenizer, text)))
    return ids, b"\1" * len(ids)


def _message_tokens(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], masking: Masking) -> Tokens:
    if row["messages"] == []:
        return [], b""  # nothing to train on, as an empty text
    if masking.completion_only_loss:
        raise ValueError(
            "completion_only_loss needs 'prompt' and 'completion', and this row has messages; "
            "assistant_only_loss masks those"
        )
    return chat_row(tokenizer, [], messages_of(row, "messages"), row, masking)


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], masking: Masking, head: list[int]
) -> Tokens:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_row(tokenizer, messages_of(row, "prompt"), messages_of(row, "completion"), row, masking)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        got = f"{shown(prompt)} and {shown(completion)}"
        raise ValueError(f"'prompt' and 'completion' must be two strings or two lists of messages, got {got}")
    if masking.assistant_only_loss:
        raise ValueError("assistant_only_loss needs chat messages, and this row has strings; completion_only_loss?")
    first, rest = split_prompt(tokenizer, prompt, prompt + completion)
    first = with_opening(head, first)
    ids = with_eos(tokenizer, first + rest)
    masked = 0 if masking.completion_only_loss is False else len(first)
    return ids, b"\0" * masked + b"\1" * (len(ids) - masked)
