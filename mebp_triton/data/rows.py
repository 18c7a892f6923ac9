"""What a row's keys mean: its text, its tokens, and which of them are trained.

``text`` and ``messages`` are trained whole, of ``prompt`` + ``completion`` the completion; ``Masking`` says otherwise.
ShareGPT's ``conversations`` become messages. Alpaca's ``instruction`` + ``output`` become prompt and completion, of
messages where the tokenizer has a chat template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .text import encode, opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from .chat import Masking, chat_row, messages_of, shown
from .text import split_prompt, with_eos

ROW_KINDS = (("text",), ("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))
KINDS_WANTED = "'text', 'prompt' and 'completion', 'messages', 'conversations', or 'instruction' and 'output'"
# All that is looked at; a row may have more.
COLUMNS = {key for kind in ROW_KINDS for key in kind} | {"tools", "system", "input", "history"}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAREGPT_ROLES |= {"tool": "tool", "observation": "tool"}
# Of Stanford Alpaca, for tokenizers without a chat template: with an input and without.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, row: Any, masking: Masking, head: list[int]
) -> tuple[list[int], bytes, bool]:
    """A row's ids; for each, 1 if it is trained and 0 if it is masked; whether the row was converted.

    ``head`` is the tokenizer's ``opening``, the same for all rows.

    Raises:
        ValueError: the row is of no kind, or of one that cannot be masked as wanted.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}  # Arrow gives every row the same keys
    kinds = [kind for kind in ROW_KINDS if all(key in row for key in kind)]
    if len(kinds) != 1:
        problem = "row of more than one kind" if kinds else "unknown row"
        keys = f"{sorted(row)!r:.300}"
        raise ValueError(f"{problem}, with the keys {keys} that are not null; give one of {KINDS_WANTED}")
    converted = kinds[0] in (("conversations",), ("instruction", "output"))
    if kinds[0] == ("conversations",):
        row = _from_sharegpt(row)
    elif kinds[0] == ("instruction", "output"):
        row = _from_alpaca(row, chat=bool(tokenizer.chat_template))

    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"'text' must be a string, got {shown(row['text'])}")
        masking.check_text()
        ids = with_eos(tokenizer, opened(encode(tokenizer, row["text"]), head))
        return ids, b"\1" * len(ids), converted
    if row.get("messages") == []:
        return [], b"", converted  # nothing to train on, as an empty text
    if "messages" in row:
        if masking.completion_only_loss:
            raise ValueError(
                "completion_only_loss needs 'prompt' and 'completion', and this row has messages; "
                "assistant_only_loss masks those"
            )
        return *chat_row(tokenizer, [], messages_of(row, "messages"), row, masking), converted
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        if masking.assistant_only_loss:
            raise ValueError("assistant_only_loss needs chat messages, and this row has strings; completion_only_loss?")
        whole = row["prompt"] + row["completion"]
        first, rest = split_prompt(tokenizer, row["prompt"], whole)
        first = opened(first, head)
        ids = with_eos(tokenizer, first + rest)
        masked = 0 if masking.completion_only_loss is False else len(first)
        return ids, b"\0" * masked + b"\1" * (len(ids) - masked), converted
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        got = f"{shown(row['prompt'])} and {shown(row['completion'])}"
        raise ValueError(f"'prompt' and 'completion' must be two strings or two lists of messages, got {got}")
    prompt, completion = messages_of(row, "prompt"), messages_of(row, "completion")
    return *chat_row(tokenizer, prompt, completion, row, masking), converted


# --- rows of other projects -----------------------------------------------------------------------------------------


def _from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """``conversations``, of ``from`` and ``value`` (or ``role`` and ``content``), as ``messages``."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"'conversations' must be a list of turns, got {shown(turns)}")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") and turns else []
    for turn in turns:
        if isinstance(turn, dict) and "role" in turn:
            messages.append(turn)
            continue
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise ValueError(f"a turn of 'conversations' must be an object with 'from' and 'value', got {shown(turn)}")
        if turn["from"] not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise ValueError(
                f"a turn of 'conversations' is from {turn['from']!r:.100}; known are {known}: use 'messages'"
            )
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return {"messages": messages, "tools": row.get("tools")}


def _from_alpaca(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    """``instruction``, ``input`` and ``output`` as ``prompt`` and ``completion``."""
    found = {key: row.get(key) or "" for key in ("instruction", "input", "output", "system")}
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"'{key}' must be a string, got {shown(value)}")
    if row.get("history"):
        raise ValueError("'history' beside 'instruction' is not supported; give the turns as 'messages'")
    if not chat:
        if found["system"]:
            raise ValueError("'system' beside 'instruction' needs a chat template, and the tokenizer has none; drop it")
        text = ALPACA[0 if found["input"] else 1].format(instruction=found["instruction"], input=found["input"])
        return {"prompt": text, "completion": found["output"]}
    asked = "\n".join(part for part in (found["instruction"], found["input"]) if part)
    prompt = [{"role": "system", "content": found["system"]}] if found["system"] else []
    prompt.append({"role": "user", "content": asked})
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": found["output"]}]}
