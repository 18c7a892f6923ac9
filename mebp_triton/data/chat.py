"""Chat messages: rendered by the tokenizer's template, and masked by who speaks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .text import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from .text import split_prompt

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Masking:
    """What of a row enters the loss; the names are TRL's.

    Attributes:
        completion_only_loss: of ``prompt`` + ``completion`` the completion only. None: so, where a row has them. True:
            every row must. False: the prompt too.
        assistant_only_loss: of chat messages the assistant's turns only. Every row must be of messages.
    """

    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False

    def check_text(self) -> None:
        """ValueError where plain text, which has no parts, cannot be masked as wanted."""
        if self.completion_only_loss:
            raise ValueError("completion_only_loss needs 'prompt' and 'completion', and this is text: leave it out")
        if self.assistant_only_loss:
            raise ValueError("assistant_only_loss needs chat messages, and this is text: leave it out")


# --- chat -----------------------------------------------------------------------------------------------------------


def chat_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, Any]],
    answer: list[dict[str, Any]],
    row: dict[str, Any],
    masking: Masking,
) -> tuple[list[int], bytes]:
    """Ids and mask of a conversation, of which ``prompt`` (perhaps nothing) is masked unless masking says otherwise."""
    messages = prompt + answer
    whole = _render(tokenizer, messages, row)
    opening = ""
    if prompt:
        found = _opening(tokenizer, prompt, row, whole)
        if found is None:
            raise ValueError(
                "the chat template writes 'prompt' differently when 'completion' follows; give both as strings"
            )
        opening = found
    first = 0 if masking.completion_only_loss is False else len(opening)
    if not masking.assistant_only_loss:
        spans = [(first, len(whole))]
    elif GENERATION.search(_template(tokenizer, row)):
        return _marked(tokenizer, messages, row, whole, whole[:first])
    else:
        spans = _assistant_spans(tokenizer, messages, row, whole)
    spans = [(max(start, first), stop) for start, stop in spans if stop > first]
    return _tokens(tokenizer, whole, spans, cuts={len(opening)})


def _opening(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], row: dict[str, Any], whole: str
) -> str | None:
    """What ``whole`` begins with before an answer to ``messages``; None where it does not begin with them."""
    for header in (True, False):  # the header that opens the answer is given at inference, so it is part of the prompt
        opening = _render(tokenizer, messages, row, add_generation_prompt=header)
        if whole.startswith(opening):
            return opening
    return None


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], row: dict[str, Any], whole: str
) -> list[tuple[int, int]]:
    """Where in ``whole`` the assistant's turns stand, by what each adds to the conversation before it."""
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = whole if place + 1 == len(messages) else _render(tokenizer, messages[: place + 1], row)
        if not whole.startswith(after):  # perhaps for the end-of-sequence token that closes the conversation (Phi-3)
            after = after.removesuffix(tokenizer.eos_token or "")
        if place:
            before = _opening(tokenizer, messages[:place], row, whole)
        else:
            before = _before_first(tokenizer, message, row, after)
        if before is None or not whole.startswith(after) or len(before) >= len(after):
            raise ValueError(
                f"the chat template writes message {place + 1}, or those before it, differently when others follow, "
                "so assistant_only_loss cannot tell the assistant's tokens; mark them in the template by "
                "{% generation %}, or give each answer as a row of its own"
            )
        spans.append((len(before), len(after)))
    return spans


def _before_first(
    tokenizer: PreTrainedTokenizerBase, message: dict[str, Any], row: dict[str, Any], turn: str
) -> str | None:
    """What stands in ``turn`` before the answer that begins a conversation: up to the header, or to the answer itself.

    A header is what the template adds where an answer to anything is wanted. None where neither is found.
    """
    question = [{"role": "user", "content": "?"}]
    asked, wanted = (_render(tokenizer, question, row, add_generation_prompt=header) for header in (False, True))
    header = wanted.removeprefix(asked) if wanted.startswith(asked) else ""
    for mark, length in ((header, len(header)), ((message.get("content") or "").strip(), 0)):
        if mark and mark in turn:
            return turn[: turn.index(mark) + length]
    return None


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], row: dict[str, Any], whole: str, masked: str
) -> tuple[list[int], bytes]:
    """Ids and mask by the template's own marks; ``masked``: a beginning that is not trained whatever they say."""
    if not tokenizer.is_fast:
        raise ValueError(
            "assistant_only_loss by a template's {% generation %} needs a fast tokenizer, and this is none"
        )
    found: Any = tokenizer.apply_chat_template(
        messages,
        tools=_tools(row),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids, trained = list(found["input_ids"]), bytes(found["assistant_masks"])
    if ids != encode(tokenizer, whole):
        raise ValueError("the tokenizer gives a conversation other ids than its text: leave out assistant_only_loss")
    head = encode(tokenizer, masked)
    if ids[: len(head)] != head:
        raise ValueError(
            "a token lies across the end of 'prompt'; leave out completion_only_loss or assistant_only_loss"
        )
    return ids, b"\0" * len(head) + trained[len(head) :]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, whole: str, spans: list[tuple[int, int]], cuts: set[int]
) -> tuple[list[int], bytes]:
    """Ids of ``whole`` with no token across an end of a span or a cut, each trained if it lies in a span."""
    places = sorted((cuts | {place for span in spans for place in span}) - {0, len(whole)})
    parts, text = [], whole
    for place in reversed(places):
        _, rest = split_prompt(tokenizer, text[:place], text)
        parts.append(rest)
        text = text[:place]
    parts.append(encode(tokenizer, text))
    ids, trained = [], b""
    for start, part in zip([0, *places], reversed(parts), strict=True):
        ids += part
        trained += bytes([any(first <= start < stop for first, stop in spans)]) * len(part)
    return ids, trained


def messages_of(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' must be a list of messages, not empty, got {shown(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message of '{key}' must be an object with 'role' and 'content', got {shown(message)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"the 'content' of a message of '{key}' must be a string, got {shown(content)}")
    # Templates add it to a string, Arrow leaves None out, and so does transformers.
    return [message | {"content": message.get("content") or ""} for message in messages]


def _template(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        raise ValueError("chat messages, but the tokenizer has no chat template; set one, or give strings")
    return tokenizer.get_chat_template(None, _tools(row))


def _tools(row: dict[str, Any]) -> Any:
    """The row's tools; as JSON in a string where a column must be of one type."""
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) if tools else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"'tools' is a string that is not JSON ({error})") from error


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    row: dict[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    _template(tokenizer, row)
    try:
        # Rendered to text and tokenised by encode: transformers 4 and 5 return ids in different containers.
        text = tokenizer.apply_chat_template(
            messages,
            tools=_tools(row),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            return_dict=False,
        )
    except Exception as error:  # a template is a program, and may end as one does
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template refuses the messages ({kind}{reason:.300}); change the row") from error
    assert isinstance(text, str)
    return text


def shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
