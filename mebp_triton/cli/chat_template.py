"""The chat template of a command: from a file, or from the adapter that was trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mebp_triton.data.template import Headers, Template
from mebp_triton.data.tokenized import DataReport
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


def _template(tokenizer: Any) -> Template | None:
    try:
        return Template.of(tokenizer, {})
    except ValueError:  # there is none for a plain chat
        return None


def describe_training(tokenizer: Any, report: DataReport, date: datetime) -> Iterator[str]:
    """Yields lines about the rows that the template wrote, which a user must know.

    That it wrote ``date``; where rows open their answers otherwise than the template does when one is wanted.
    """
    template = _template(tokenizer)
    headers = Headers() if template is None else template.headers()
    if template is not None and report.chat_rows and template.writes_date():
        yield f"the chat template writes the date: {date:%Y-%m-%d}, when the run began, also where it is resumed later"
    if report.chat_rows and headers.written and not headers.prompt:
        yield (
            f"the chat template writes nothing where an answer is wanted: in {report.chat_rows:,} chat rows "
            f"{headers.written!r:.80}, which it writes before answers, counts as part of the question, and "
            "`mebp generate --chat` adds it; for other programs, give a template with add_generation_prompt by "
            "--chat-template FILE"
        )
    if report.unopened_rows:
        ends = f" ({headers.prompt!r:.80})" if headers.prompt else ""
        yield (
            f"{report.unopened_rows:,} of {report.chat_rows:,} chat rows have no answer behind what the chat template "
            f"writes where one is wanted{ends}, so the model is not trained to go on from there; give a template that "
            "writes it before answers too by --chat-template FILE"
        )


def describe_prompt(tokenizer: Any, adapted: bool) -> Iterator[str]:
    """Yields a line where a chat's prompt ends otherwise than the template would end it, or an adapter may know it."""
    template = _template(tokenizer)
    headers = Headers() if template is None else template.headers()
    if headers.written and not headers.prompt:
        yield (
            f"the chat template writes nothing where an answer is wanted: {headers.written!r:.80}, which it writes "
            "before answers, was added"
        )
    elif adapted and not headers.agree:
        yield (
            f"the chat template ends the prompt by {headers.prompt!r:.80}, and opens answers by "
            f"{headers.written!r:.80}: an adapter trained on such answers has not learnt to go on from there; "
            "`mebp train` takes another template by --chat-template FILE"
        )
