"""The tokenizer's chat template: a program that writes a conversation as a text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .messages import Message, parsed, shown, with_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that no template writes itself. Nothing in them can be stripped, split or escaped.
QUESTION, ANSWER, NEXT = "alphaquestion", "betaanswer", "gammaquestion"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What the package itself says to the template; a row may say anything else.
OWN_ARGUMENTS = {"messages", "conversation", "tools", "add_generation_prompt", "tokenize", "return_dict"}
OWN_ARGUMENTS |= {"chat_template", "continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"}


@dataclass(frozen=True)
class Template:
    """A tokenizer's template with what a row gives it beside messages.

    Attributes:
        tools: for templates that describe them.
        arguments: further variables of the template, such as ``enable_thinking``.
        takes_parts: whether it takes contents as lists of parts alone, as some models of images have it.
        date: what the template takes for now, by ``strftime_now``; None for the true time.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    takes_parts: bool = False
    date: datetime | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], date: datetime | None = None) -> Template:
        """Takes ``tools`` and ``chat_template_kwargs`` of a row.

        Raises:
            ValueError: there is no template, or they are not what they should be.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "chat messages, but the tokenizer has no chat template; "
                "name a file with one by chat_template (of train and eval), or give strings"
            )
        tools, named = parsed(row, "tools"), tokenizer.chat_template
        if isinstance(named, dict) and "default" not in named and not (tools is not None and "tool_use" in named):
            raise ValueError(
                f"the tokenizer has chat templates named {', '.join(sorted(named))}, and none named default: write the "
                "one that is meant into a file, and give it to train (or eval) by --chat-template FILE"
            )
        arguments = parsed(row, "chat_template_kwargs") or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"'chat_template_kwargs' must be an object, got {shown(arguments)}")
        if taken := OWN_ARGUMENTS & set(arguments):
            raise ValueError(f"'chat_template_kwargs' has {min(taken)!r}, which is set by the training; remove it")
        template = cls(tokenizer, tools, arguments, date=date)
        return replace(template, takes_parts=True) if template._loses_strings() else template

    def _loses_strings(self) -> bool:
        """Whether it writes a text only if that is a part of a list."""
        if not {"type", "text"} <= self.words:
            return False
        question = [{"role": "user", "content": "7?"}]
        try:
            if "7?" in self.render(question):
                return False
        except ValueError:
            pass
        try:
            return "7?" in replace(self, takes_parts=True).render(question)
        except ValueError:
            return False  # it refuses either, and says why at the row itself

    @property
    def text(self) -> str:
        """The template itself. Some tokenizers have a second one for rows with tools."""
        return self.tokenizer.get_chat_template(None, self.tools)

    @property
    def marks_answers(self) -> bool:
        """Whether it marks the assistant's turns by ``{% generation %}``."""
        return GENERATION.search(self.text) is not None

    @property
    def words(self) -> frozenset[str]:
        """All words in it: a key that is none of them cannot change what it writes."""
        return _words(self.text)

    def writes_date(self) -> bool:
        """Whether it writes today's date, as those of Llama 3.2 and gpt-oss do."""
        if not may_write_date(self.text):
            return False
        messages = [{"role": "user", "content": QUESTION}]
        try:
            dates = datetime(2000, 1, 1), datetime(2001, 12, 31, 23, 59, 59)
            dated = [replace(self, date=date)._render(messages) for date in dates]
        except ValueError:  # it may want other messages than these
            return True
        return dated[0] != dated[1]

    def headers(self) -> Headers:
        """Returns the text that opens an answer; nothing where the template refuses a plain chat."""
        # Found once for all rows that give the template the same; ``text`` is only there to tell templates apart.
        return _headers(self.tokenizer, self.text, json.dumps(self.arguments, default=str), self.takes_parts)

    def render(self, messages: list[Message], header: bool = False) -> str:
        """The text of a conversation; ``header`` adds what opens an answer.

        Where the template has no generation prompt, that is the header which it writes before an answer.
        """
        text = self._render(messages, header)
        return text + self.headers().written if header and not self.headers().prompt else text

    def _render(self, messages: list[Message], header: bool = False) -> str:
        # As a text, which ``encode`` tokenizes: transformers 4 and 5 return ids in different containers.
        text = self.apply(messages, add_generation_prompt=header, tokenize=False, return_dict=False)
        assert isinstance(text, str)
        return text

    def apply(self, messages: list[Message], **options: Any) -> Any:
        """Calls ``apply_chat_template``. Raises ValueError of one line where the template refuses the messages."""
        from jinja2 import TemplateError

        if self.takes_parts:
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        if self.date is not None and may_write_date(self.text):
            options["chat_template"] = _dated(self.text, self.date)
        options |= self.arguments
        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **options)
        except Exception as error:  # a template is a program, and may raise anything
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            reason = " ".join(str(error).split())
            refused = ValueError(f"the chat template refuses the messages ({kind}{reason:.300}); change the row")
            refused.__cause__ = error
        strings = [_with_strings(message) for message in messages]
        if strings == messages:
            raise refused
        try:  # DeepSeek's takes the arguments of tool calls as strings alone
            return self.tokenizer.apply_chat_template(strings, tools=self.tools, **options)
        except Exception:  # as above; the first reason is the one about the row as it is
            raise refused from refused.__cause__


def may_write_date(text: str) -> bool:
    """Whether a template asks for today's date; ``Template.writes_date`` tells whether it then writes it."""
    return "strftime_now" in _words(text)


def _with_strings(message: Message) -> Message:
    calls = message.get("tool_calls")
    return message | {"tool_calls": with_arguments(calls, str)} if isinstance(calls, list) else message


@lru_cache(maxsize=4)
def _dated(text: str, date: datetime) -> str:
    """A template in which it is always ``date``.

    A macro takes the place of transformers' own ``strftime_now``: functions cannot be given to a template.
    """
    codes = sorted(set(re.findall(r"%[-_0^#]?[A-Za-z]", text)))
    replaced = "".join(f".replace({code!r}, {date.strftime(code)!r})" for code in [*codes, "%%"])
    # The newline is dropped, like any behind a tag; one that the template begins with would be dropped instead.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{text}"


@lru_cache(maxsize=4)
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


@dataclass(frozen=True)
class Headers:
    """The text between a question and its answer.

    Attributes:
        prompt: the generation prompt: what the template writes where an answer is wanted.
        written: what it writes there in a conversation; "" for white space alone.
    """

    prompt: str = ""
    written: str = ""

    @property
    def agree(self) -> bool:
        """Whether an answer that is asked for begins as those of a conversation do."""
        return self.written.startswith(self.prompt.rstrip(" "))


@lru_cache(maxsize=4)
def _headers(tokenizer: PreTrainedTokenizerBase, text: str, arguments: str, takes_parts: bool) -> Headers:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    render = Template(tokenizer, None, json.loads(arguments), takes_parts, datetime(2000, 1, 1))._render
    try:
        asked, wanted = render(messages[:1]), render(messages[:1], True)
        answered = render(messages)
    except ValueError:  # it may want other messages than these
        return Headers()
    if not wanted.startswith(asked):  # Phi-3's closes what asks for no answer by the end-of-sequence token
        asked = asked.removesuffix(tokenizer.eos_token or "")
    if not wanted.startswith(asked):
        return Headers()
    prompt = wanted.removeprefix(asked)
    written, found, _ = answered.removeprefix(asked).partition(ANSWER)
    if not (found and answered.startswith(asked) and written.strip()):
        written = ""
    return Headers(prompt, written.rstrip(" "))  # a space there belongs to the answer's first word
