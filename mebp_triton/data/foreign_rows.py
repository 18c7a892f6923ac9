"""Rows in the forms of other projects, converted to messages, or to prompt and completion."""

from __future__ import annotations

from typing import Any

from .chat import shown

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAREGPT_ROLES |= {"tool": "tool", "observation": "tool"}
# Stanford Alpaca's prompts, with an input and without, for tokenizers that have no chat template.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)


def from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """Converts ShareGPT's ``conversations``, of ``from`` and ``value`` (or ``role`` and ``content``), to messages."""
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
            roles = ", ".join(SHAREGPT_ROLES)
            raise ValueError(
                f"a turn of 'conversations' is from {turn['from']!r:.100}; known are {roles}: use 'messages'"
            )
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return {"messages": messages, "tools": row.get("tools")}


def from_alpaca(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    """Converts Alpaca's ``instruction``, ``input`` and ``output`` to ``prompt`` and ``completion``.

    With ``chat`` they become messages, for the tokenizer's template; otherwise strings, by Alpaca's own prompts.
    """
    texts = {key: row.get(key) or "" for key in ("instruction", "input", "output", "system")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"'{key}' must be a string, got {shown(value)}")
    if row.get("history"):
        raise ValueError("'history' beside 'instruction' is not supported; give the turns as 'messages'")
    if not chat:
        if texts["system"]:
            raise ValueError("'system' beside 'instruction' needs a chat template, and the tokenizer has none; drop it")
        text = ALPACA[0 if texts["input"] else 1].format(instruction=texts["instruction"], input=texts["input"])
        return {"prompt": text, "completion": texts["output"]}
    asked = "\n".join(part for part in (texts["instruction"], texts["input"]) if part)
    prompt = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    prompt.append({"role": "user", "content": asked})
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": texts["output"]}]}
