"""Alpaca's rows, converted to prompt and completion."""

from __future__ import annotations

from typing import Any

from .messages import shown

# Stanford Alpaca's prompts, with an input and without, for tokenizers that have no chat template.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)


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
        return row | {"prompt": text, "completion": texts["output"]}
    asked = "\n".join(part for part in (texts["instruction"], texts["input"]) if part)
    prompt = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    prompt.append({"role": "user", "content": asked})
    return row | {"prompt": prompt, "completion": [{"role": "assistant", "content": texts["output"]}], "system": None}
