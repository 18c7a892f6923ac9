"""Chat messages in the one form that templates take, whoever wrote them, and what they say about their own loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

# What other projects call the roles of a conversation. Roles that are not here stay as they are.
ROLES = {"user": "user", "human": "user", "system": "system", "tool": "tool", "observation": "tool"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant")
# Keys by which a message says whether it is trained: 1 or true for yes, 0 or false for no.
TRAINED_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_scale", "loss_mask")
MASKED_KEYS = ("masked",)  # the other way round
# Keys by which a row does. Others of the above are no statement about a row: "train" may be the name of a split.
ROW_KEYS = ("weight", "loss_weight", "sample_weight")
TEXT_PARTS = ("text", "input_text", "output_text")
TRUTH = {"false": 0.0, "true": 1.0}


@dataclass(frozen=True)
class Conversation:
    """Messages, each with ``role`` and ``content``.

    Attributes:
        messages: as templates take them.
        said: by the place of a message, what its own keys say: True for trained, False for masked.
        converted: whether a role or a key had another project's name.
    """

    messages: list[Message]
    said: dict[int, bool]
    converted: bool


def conversation_of(row: dict[str, Any], key: str) -> Conversation:
    """Reads the messages under ``key``: of ``role`` and ``content``, or of ShareGPT's ``from`` and ``value``.

    A ``system`` of the row comes before them.

    Raises:
        ValueError: they are no messages, or say something about their loss that cannot be done.
    """
    given = parsed(row, key)
    if not isinstance(given, list) or not given:
        raise ValueError(f"'{key}' must be a list of messages, not empty, got {shown(given)}")
    messages, said, converted = [], {}, False
    for place, raw in enumerate(given):
        message, foreign = _message(raw, key)
        statement = switch(message, TRAINED_KEYS, MASKED_KEYS, f"message {place + 1} of '{key}'")
        if statement is not None:
            said[place] = statement
        for name in TRAINED_KEYS + MASKED_KEYS:
            message.pop(name, None)
        messages.append(message)
        converted |= foreign
    return _with_system(Conversation(messages, said, converted), row.get("system"))


def _message(raw: Any, key: str) -> tuple[Message, bool]:
    """A message with ``role`` and ``content``, and whether its role or its keys had to be changed for that."""
    wanted = f"a message of '{key}' must be an object with 'role' and 'content'"
    if not isinstance(raw, dict):
        raise ValueError(f"{wanted}, got {shown(raw)}")
    message = {name: value for name, value in raw.items() if value is not None}
    foreign = "role" not in message and "from" in message
    if foreign:
        message["role"] = message.pop("from")
        if "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{wanted}, got {shown(raw)}")
    role = ROLES.get(message["role"].lower(), message["role"])
    if foreign and role not in ROLES.values():
        raise ValueError(
            f"a message of '{key}' is from {role!r:.100}; known are {', '.join(ROLES)}: use 'role' and 'content'"
        )
    foreign |= role != message["role"]
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, key)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"the 'content' of a message of '{key}' must be a string, got {shown(content)}")
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = with_arguments(message["tool_calls"], dict)
    # A message of tool calls may have no content. Templates add it to a string, so it becomes an empty one.
    return message | {"role": role, "content": content or ""}, foreign


def with_arguments(calls: list[Any], form: type[dict[str, Any]] | type[str]) -> list[Any]:
    """Tool calls with their arguments as objects, or as JSON in strings.

    Strings are the form of OpenAI's interface. Most templates want objects, and write a string as JSON of JSON.
    """
    return [_with_arguments(call, form) if isinstance(call, dict) else call for call in calls]


def _with_arguments(call: dict[str, Any], form: type[dict[str, Any]] | type[str]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"], form)}
    arguments = call.get("arguments")
    if form is str and isinstance(arguments, dict):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if form is dict and isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError):
            return call  # the template decides
        return call | {"arguments": value} if isinstance(value, dict) else call
    return call


def _joined_parts(parts: list[Any], key: str) -> str:
    """The text of a content given as a list of parts: templates that take such lists write it without a gap.

    Raises:
        ValueError: a part is no text, or says that it is not trained, unlike the rest of its message.
    """
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = part["type"] if isinstance(part, dict) and isinstance(part.get("type"), str) else shown(part)
            raise ValueError(
                f"the 'content' of a message of '{key}' has a part of type {kind:.100}; "
                'only text is trained on: {"type": "text", "text": ...}'
            )
        if switch(part, TRAINED_KEYS, MASKED_KEYS, f"a part of a message of '{key}'") is False:
            raise ValueError(
                f"a part of a message of '{key}' says that it is not trained; a message is trained as a whole: "
                "say so beside its 'content'"
            )
        texts.append(part["text"])
    return "".join(texts)


def _with_system(conversation: Conversation, system: Any) -> Conversation:
    """The conversation behind the row's ``system``, unless it begins with the same itself."""
    if not system:
        return conversation
    if not isinstance(system, str):
        raise ValueError(f"'system' must be a string, got {shown(system)}")
    first = conversation.messages[0]
    if first["role"] == "system":
        if first["content"].strip() != system.strip():
            raise ValueError("'system' of the row and its system message differ; keep one of them")
        return conversation
    said = {place + 1: statement for place, statement in conversation.said.items()}
    return Conversation([{"role": "system", "content": system}, *conversation.messages], said, conversation.converted)


def switch(keys: dict[str, Any], trained: Iterable[str], masked: Iterable[str], what: str) -> bool | None:
    """Returns what the keys of ``what``, a message or a row, say: True for trained, False for masked, else None.

    Raises:
        ValueError: a value is something between, or two keys contradict each other.
    """
    said = {}
    for name, positive in [*((name, True) for name in trained), *((name, False) for name in masked)]:
        value = keys.get(name)
        if value is None:
            continue
        told = _number(value)
        if told not in (0, 1):
            raise ValueError(
                f"'{name}' of {what} is {value!r:.60}; only 0 and 1 (false and true) have a meaning here: "
                "give one of them, or remove the key"
            )
        said[name] = bool(told) is positive
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, said))} of {what} contradict each other; keep one of them")
    return next(iter(said.values()), None)


def _number(value: Any) -> float | None:
    """A number or truth value as a number, also from a string; None for anything else."""
    if isinstance(value, str):
        word = value.strip().lower()
        try:
            return TRUTH[word] if word in TRUTH else float(word)
        except ValueError:
            return None
    return float(value) if isinstance(value, bool | int | float) else None


def row_switch(row: dict[str, Any]) -> bool | None:
    """Returns what a row's own weight says; None where the value is no number, and so another thing of this name."""
    return switch({name: row[name] for name in ROW_KEYS if _number(row.get(name)) is not None}, ROW_KEYS, (), "the row")


def parsed(row: dict[str, Any], key: str) -> Any:
    """The value under ``key``; JSON in a string is parsed, since a column of a table has one type."""
    value = row.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"'{key}' is a string that is not JSON ({error})") from error


def with_parsed_pair(row: dict[str, Any]) -> dict[str, Any]:
    """The row with ``prompt`` and ``completion`` as lists where both are JSON of messages, as in cells of a table."""
    pair = {key: row[key] for key in ("prompt", "completion")}
    if not all(isinstance(value, str) and value.lstrip()[:1] == "[" for value in pair.values()):
        return row
    try:
        pair = {key: json.loads(value) for key, value in pair.items()}
    except (json.JSONDecodeError, RecursionError):
        return row
    items = [item for messages in pair.values() for item in messages or [None]]
    are_messages = all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)
    return row | pair if are_messages else row


def unknown_keys(messages: list[Message], known: frozenset[str], key: str) -> Counter[str]:
    """Counts the keys of messages that are not among ``known``, the words of the chat template."""
    names = (name for message in messages for name in message if name not in ("role", "content") and name not in known)
    return Counter(f"{key}[].{name}" for name in names)


def shown(value: Any) -> str:
    """A value in an error message: its type, and how it begins."""
    return f"{type(value).__name__} {value!r:.60}"
