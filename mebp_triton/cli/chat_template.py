"""The chat template of a command: from a file, or from the adapter that was trained with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mebp_triton.data.template import Template
from mebp_triton.models.adapter import CHAT_TEMPLATE
from mebp_triton.system import reading

from .console import say

MOST_BYTES = 1 << 22
PROBE = "What is 17 plus 25?"


def read_template(path: Path, name: str) -> str:
    """The text of a template. ValueError, which names the file, where it cannot be read or is empty."""
    if not path.is_file():
        raise ValueError(f"{name} {path}: no such file; give a file with a template in Jinja")
    try:
        text = reading.read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{name} {path}: not UTF-8 ({error}); convert the file") from error
    if not text.strip():
        raise ValueError(f"{name} {path}: is empty; give a file with a template in Jinja")
    return text


def use_template(tokenizer: Any, text: str, where: str) -> None:
    """Gives the tokenizer another template, for conversations with tools and without.

    Args:
        where: what the template comes from, for errors.

    Raises:
        ValueError: it is no Jinja, or writes nothing of what a message says.
    """
    import jinja2

    tokenizer.chat_template = text
    try:
        written = Template.of(tokenizer, {}).render([{"role": "user", "content": PROBE}])
    except ValueError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            cause = error.__cause__
            raise ValueError(f"{where}: no Jinja (line {cause.lineno}: {cause.message}); mend the file") from error
        return  # it may want other messages than this one: each row will tell
    if PROBE not in written:
        raise ValueError(f"{where}: it writes nothing of what a message says; give a file with a template in Jinja")


def template_of_run(file: str | None, adapters: Iterable[Path | None]) -> str | None:
    """The template to train with: that of ``file``, or of the first adapter that has one; None for the store's."""
    if file is not None:
        return read_template(Path(file), "chat-template")
    paths = [adapter / CHAT_TEMPLATE for adapter in adapters if adapter is not None]
    return next((read_template(path, "chat template") for path in paths if path.is_file()), None)


def use_template_of(tokenizer: Any, adapter: Path | str | None) -> None:
    """Gives the tokenizer the template in the adapter's directory, if there is one."""
    path = None if adapter is None else Path(adapter) / CHAT_TEMPLATE
    if path is None or not path.is_file():
        return
    text = read_template(path, "chat template")
    if text != tokenizer.chat_template:
        use_template(tokenizer, text, f"chat template {path}")
        say(f"chat template: {path}")
