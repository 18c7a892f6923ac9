"""Chat messages as tokens: rendered by the tokenizer's template, and masked by who speaks.

A template is a program that writes a text, so where a turn lies in it must be found out. If the template marks the
assistant's turns by ``{% generation %}``, transformers tells their tokens. If not, a conversation is rendered again and
again, each time with one more turn: what a turn adds is its text. That holds for templates that write earlier turns in
the same way whatever follows; others are refused.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .masking import Masking
from .text import encode, split_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    answer: list[Message],
    row: dict[str, Any],
    masking: Masking,
) -> tuple[list[int], bytes]:
    """Tokenizes a conversation.

    Args:
        prompt: the messages that are given, perhaps none. They are masked unless ``masking`` says otherwise.
        answer: the messages that follow.
        row: where the messages come from, with ``tools`` for the template, if any.

    Returns:
        The ids, and for each a byte: 1 if it is trained, 0 if it is masked.

    Raises:
        ValueError: the template refuses the messages, or does not let its turns be told apart.
    """
    messages = prompt + answer
    whole = _render(tokenizer, messages, row)
    prompt_text: str | None = _prompt_text(tokenizer, prompt, row, whole) if prompt else ""
    if prompt_text is None:
        raise ValueError(
            "the chat template writes 'prompt' differently when 'completion' follows; give both as strings"
        )
    first = 0 if masking.completion_only_loss is False else len(prompt_text)
    if not masking.assistant_only_loss:
        spans = [(first, len(whole))]
    elif GENERATION.search(_template(tokenizer, row)):
        return _marked_tokens(tokenizer, messages, row, whole, whole[:first])
    else:
        spans = _assistant_spans(tokenizer, messages, row, whole)
    spans = [(max(start, first), stop) for start, stop in spans if stop > first]
    return _span_tokens(tokenizer, whole, spans, cuts={len(prompt_text)})


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], row: dict[str, Any], whole: str
) -> str | None:
    """The part of ``whole`` that comes before an answer to ``messages``; None where ``whole`` begins otherwise.

    The header that opens an answer counts as part of it: at inference the template writes it, and not the model.
    """
    for header in (True, False):
        text = _render(tokenizer, messages, row, add_generation_prompt=header)
        if whole.startswith(text):
            return text
    return None


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], row: dict[str, Any], whole: str
) -> list[tuple[int, int]]:
    """Where the assistant's turns begin and end in ``whole``, found by what each adds to the turns before it."""
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = whole if place + 1 == len(messages) else _render(tokenizer, messages[: place + 1], row)
        if not whole.startswith(after):  # some templates (Phi-3) close any conversation by an end-of-sequence token
            after = after.removesuffix(tokenizer.eos_token or "")
        if place:
            before = _prompt_text(tokenizer, messages[:place], row, whole)
        else:
            before = _text_before_first_answer(tokenizer, message, row, after)
        if before is None or not whole.startswith(after) or len(before) >= len(after):
            raise ValueError(
                f"the chat template writes message {place + 1}, or those before it, differently when others follow, "
                "so assistant_only_loss cannot tell the assistant's tokens; mark them in the template by "
                "{% generation %}, or give each answer as a row of its own"
            )
        spans.append((len(before), len(after)))
    return spans


def _text_before_first_answer(
    tokenizer: PreTrainedTokenizerBase, message: Message, row: dict[str, Any], turn: str
) -> str | None:
    """The part of ``turn``, a conversation's first and the assistant's, that comes before the answer.

    No turns before it can be rendered. But the template's header for an answer is known: it is what the template adds
    to any question where an answer is wanted. The answer begins behind it; where the turn has no header, it begins
    where its content does. None where neither is found.
    """
    question = [{"role": "user", "content": "?"}]
    asked, wanted = (_render(tokenizer, question, row, add_generation_prompt=header) for header in (False, True))
    header = wanted.removeprefix(asked) if wanted.startswith(asked) else ""
    for mark, length in ((header, len(header)), ((message.get("content") or "").strip(), 0)):
        if mark and mark in turn:
            return turn[: turn.index(mark) + length]
    return None


def _marked_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], row: dict[str, Any], whole: str, masked: str
) -> tuple[list[int], bytes]:
    """Ids and mask by the template's own marks. ``masked`` is the beginning of the text that is not trained anyway."""
    if not tokenizer.is_fast:
        raise ValueError(
            "assistant_only_loss by a template's {% generation %} needs a fast tokenizer, and this is none"
        )
    encoded: Any = tokenizer.apply_chat_template(
        messages,
        tools=_tools(row),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids, trained = list(encoded["input_ids"]), bytes(encoded["assistant_masks"])
    if ids != encode(tokenizer, whole):
        raise ValueError("the tokenizer gives a conversation other ids than its text: leave out assistant_only_loss")
    head = encode(tokenizer, masked)
    if ids[: len(head)] != head:
        raise ValueError(
            "a token lies across the end of 'prompt'; leave out completion_only_loss or assistant_only_loss"
        )
    return ids, b"\0" * len(head) + trained[len(head) :]


def _span_tokens(
    tokenizer: PreTrainedTokenizerBase, whole: str, spans: list[tuple[int, int]], cuts: set[int]
) -> tuple[list[int], bytes]:
    """The ids of ``whole``, each trained if it lies in a span; no token lies across a cut, or an end of a span.

    At inference the text up to a cut is tokenized alone, and the model goes on from there: so are the parts here.
    """
    places = sorted((cuts | {place for span in spans for place in span}) - {0, len(whole)})
    parts, text = [], whole
    for place in reversed(places):  # from the end, so that each part is read off the longest text before it
        _, rest = split_prompt(tokenizer, text[:place], text)
        parts.append(rest)
        text = text[:place]
    parts.append(encode(tokenizer, text))
    ids, trained = [], b""
    for start, part in zip([0, *places], reversed(parts), strict=True):
        ids += part
        trained += bytes([any(first <= start < stop for first, stop in spans)]) * len(part)
    return ids, trained


def messages_of(row: dict[str, Any], key: str) -> list[Message]:
    """The messages under ``key``, each with a content. ValueError where they are none."""
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' must be a list of messages, not empty, got {shown(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message of '{key}' must be an object with 'role' and 'content', got {shown(message)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"the 'content' of a message of '{key}' must be a string, got {shown(content)}")
    # A message of tool calls may have no content. Templates add it to a string, so it becomes an empty one.
    return [message | {"content": message.get("content") or ""} for message in messages]


def _template(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    """The tokenizer's chat template. ValueError where it has none."""
    if not tokenizer.chat_template:
        raise ValueError("chat messages, but the tokenizer has no chat template; set one, or give strings")
    return tokenizer.get_chat_template(None, _tools(row))


def _tools(row: dict[str, Any]) -> Any:
    """The row's tools. They may be JSON in a string, since a column of a table has one type."""
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) if tools else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"'tools' is a string that is not JSON ({error})") from error


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    row: dict[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation; ``add_generation_prompt`` adds the header that opens an answer."""
    from jinja2 import TemplateError

    _template(tokenizer, row)
    try:
        # As a text, which ``encode`` tokenizes: transformers 4 and 5 return ids in different containers.
        text = tokenizer.apply_chat_template(
            messages,
            tools=_tools(row),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            return_dict=False,
        )
    except Exception as error:  # a template is a program, and may raise anything
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template refuses the messages ({kind}{reason:.300}); change the row") from error
    assert isinstance(text, str)
    return text


def shown(value: Any) -> str:
    """A value in an error message: its type, and how it begins."""
    return f"{type(value).__name__} {value!r:.60}"
