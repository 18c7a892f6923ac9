"""Conversations as tokens: written by the chat template, and masked by who speaks.

A template is a program that writes a text, so where a turn lies in it must be found out. If the template marks the
assistant's turns by ``{% generation %}``, transformers tells their tokens. If not, a conversation is rendered again and
again, each time with one more turn: what a turn adds is its text. Some templates write a turn differently once others
follow (without its thoughts, or with another end). Such an answer becomes a row of its own, which ends with it, as the
model sees it when it answers.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .masking import Masking
from .messages import Message
from .template import Template
from .text import encode, split_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], bytes]  # ids, and for each 1 if it is trained and 0 if it is masked
Span = tuple[int, int]
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of what was thought before an answer


def chat_rows(
    template: Template, messages: list[Message], given: int, said: dict[int, bool], masking: Masking
) -> tuple[list[Tokens], int, bool]:
    """Tokenizes a conversation.

    Args:
        given: how many messages are a prompt, perhaps none. They are masked unless ``masking`` says otherwise.
        said: by place, whether a message says of itself that it is trained.

    Returns:
        Ids and masks: of one row, or of several where the template rewrites answers. How many messages the template
        does not write whole, as some leave out thoughts, or what a system says. And whether there are answers, but none
        behind what the template writes where one is wanted.

    Raises:
        ValueError: the template refuses the messages, or does not let its turns be told apart.
    """
    whole = template.render(messages)
    prompt: str | None = _text_before(template, messages[:given], whole) if given else ""
    if prompt is None:
        raise ValueError(
            "the chat template writes 'prompt' differently when 'completion' follows; give both as strings"
        )
    first, least = (0, 0) if masking.completion_only_loss is False else (len(prompt), given)
    if masking.assistant_only_loss and template.marks_answers:
        parts = [_marked_tokens(template, messages, said, whole, whole[:first])]
        return parts, _shortened(template, messages, [whole]), _is_unopened(template, messages, [whole])
    if masking.assistant_only_loss:
        answers = [place for place in _answers(messages) if place >= least and said.get(place) is not False]
        found = _answer_spans(template, messages, answers, whole)
    else:
        found = {whole: _spans_without(template, messages, said, whole, (first, least))}
    cuts = {len(prompt)}
    parts = [
        _span_tokens(template.tokenizer, text, spans, cuts if text == whole else set())
        for text, spans in found.items()
        if spans or len(found) == 1
    ]
    return parts, _shortened(template, messages, list(found)), _is_unopened(template, messages, list(found))


def _is_unopened(template: Template, messages: list[Message], texts: list[str]) -> bool:
    headers = template.headers()
    opens = not headers.prompt or any(headers.prompt in text for text in texts)
    return bool(_answers(messages)) and not opens


def _shortened(template: Template, messages: list[Message], texts: list[str]) -> int:
    """How many messages say something that is in none of the texts, but for white space.

    Thoughts count only if the template knows their key: other keys are counted as without effect.
    """
    keys = ("content", *(key for key in THOUGHTS if key in template.words))
    parts = ([message[key] for key in keys if isinstance(message.get(key), str)] for message in messages)
    squeezed = [_squeezed(text) for text in texts]
    return sum(not all(any(_is_written(part, text) for text in squeezed) for part in said) for said in parts)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_written(said: str, squeezed: str) -> bool:
    """Whether a squeezed text has what a message says, or the same as JSON: so Llama 3.1 writes what a tool says."""
    return _squeezed(said) in squeezed or _squeezed(json.dumps(said, ensure_ascii=False)[1:-1]) in squeezed


def _answers(messages: list[Message]) -> list[int]:
    """The places of the assistant's messages."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _text_before(template: Template, messages: list[Message], text: str) -> str | None:
    """The part of ``text`` that comes before an answer to ``messages``; None where ``text`` begins otherwise.

    The header that opens an answer counts as part of it: at inference the template writes it, and not the model. Some
    templates end their generation prompt in more than that (R1's opens a thought).
    """
    before = template.render(messages, header=True)
    if text.startswith(before):
        return before
    before = template.render(messages)
    if not text.startswith(before):
        return None
    headed = before + template.headers().written
    return headed if text.startswith(headed) else before


def _answer_spans(template: Template, messages: list[Message], places: list[int], whole: str) -> dict[str, list[Span]]:
    """Where answers begin and end: in ``whole``, or in the text of a conversation that ends with one of them.

    The last answer comes first, because the text that ends with it may have earlier ones as they are.
    """
    found: dict[str, list[Span]] = {whole: []}
    for place in reversed(places):
        own = whole if place + 1 == len(messages) else template.render(messages[: place + 1])
        before = _text_before(template, messages[:place], own) if place else _text_before_first(template, messages, own)
        if before is None or len(before) >= len(own):
            raise ValueError(
                f"the chat template writes what comes before message {place + 1} differently when it is answered, so "
                "assistant_only_loss cannot tell the assistant's tokens; mark them in the template by "
                "{% generation %}, or give 'prompt' and 'completion' as strings"
            )
        for text, spans in found.items():
            if stop := _end_within(template, messages[place], own, text):
                spans.append((len(before), stop))
                break
        else:
            found[own] = [(len(before), len(own))]
    return found


def _end_within(template: Template, answer: Message, own: str, text: str) -> int:
    """Where ``own``, which ends with ``answer``, ends in ``text``; 0 where ``text`` begins otherwise.

    Some templates (Phi-3) close any conversation by an end-of-sequence token behind the end of its last turn. A turn
    within ``text`` does not need that token, if it has an end of its own.
    """
    if text.startswith(own):
        return len(own)
    stripped = own.removesuffix(template.tokenizer.eos_token or "")
    content = answer["content"].rstrip()
    has_end = bool(content) and not stripped.rstrip().endswith(content)
    return len(stripped) if has_end and text.startswith(stripped) else 0


def _text_before_first(template: Template, messages: list[Message], turn: str) -> str | None:
    """The part of ``turn``, a conversation's first and the assistant's, that comes before the answer.

    No turns before it can be rendered. But the template's header for an answer is known: it is what the template adds
    to any question where an answer is wanted. The answer begins behind it; where the turn has no header, it begins
    where its content does. None where neither is found.
    """
    question = [{"role": "user", "content": "?"}]
    asked, wanted = (template.render(question, header) for header in (False, True))
    header = wanted.removeprefix(asked) if wanted.startswith(asked) else ""
    for mark, length in ((header, len(header)), (messages[0]["content"].strip(), 0)):
        if mark and mark in turn:
            return turn[: turn.index(mark) + length]
    return None


def _spans_without(
    template: Template, messages: list[Message], said: dict[int, bool], whole: str, begin: tuple[int, int]
) -> list[Span]:
    """Returns the trained part of ``whole``: all but the messages that say they are not.

    Args:
        begin: the character, and the message, from which on anything is trained.
    """
    spans, (first, least) = [], begin
    for place in sorted(place for place, trained in said.items() if not trained and place >= least):
        found = _place_within(template, messages, place, whole)
        if found is None:
            raise ValueError(
                f"message {place + 1} says that it is not trained, and the chat template writes it differently when "
                "others follow, or together with another, so its tokens cannot be told; train with assistant_only_loss"
            )
        spans.append((first, found[0]))
        first = found[1]
    return [(start, stop) for start, stop in [*spans, (first, len(whole))] if start < stop]


def _place_within(template: Template, messages: list[Message], place: int, whole: str) -> Span | None:
    """Where a message begins and ends in ``whole``, the text of all; None where that cannot be told."""
    before: str | None = ""
    try:
        own = whole if place + 1 == len(messages) else template.render(messages[: place + 1])
        if place and messages[place]["role"] == "assistant":
            before = _text_before(template, messages[:place], own)
        elif place and (before := template.render(messages[:place])):
            before = before[: _end_within(template, messages[place - 1], before, whole)] or None
    except ValueError:  # it refuses a conversation that ends there
        return None
    stop = _end_within(template, messages[place], own, whole)
    if before is None or not stop:
        return None
    # Some templates (Gemma's) write what the system says only within the first question.
    said, piece = messages[place]["content"], _squeezed(whole[len(before) : stop])
    return None if _is_written(said, _squeezed(whole)) and not _is_written(said, piece) else (len(before), stop)


def _marked_tokens(
    template: Template, messages: list[Message], said: dict[int, bool], whole: str, masked: str
) -> Tokens:
    """Ids and mask by the template's own marks. ``masked`` is the beginning of the text that is not trained anyway."""
    tokenizer = template.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            "assistant_only_loss by a template's {% generation %} needs a fast tokenizer, and this is none"
        )
    encoded: Any = template.apply(
        messages,
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
    trained = _without_answers(trained, messages, said)
    return ids, b"\0" * len(head) + trained[len(head) :]


def _without_answers(trained: bytes, messages: list[Message], said: dict[int, bool]) -> bytes:
    """The mask of a marked conversation, without the answers that say they are not trained."""
    answers = _answers(messages)
    if all(said.get(place, True) for place in answers):
        return trained
    stretches = [bytes(stretch) for _, stretch in groupby(trained)]
    if sum(stretch[0] for stretch in stretches) != len(answers):
        raise ValueError(
            "a message says that it is not trained, and the template's {% generation %} does not mark the "
            f"{len(answers)} answers one by one, so its tokens cannot be told; remove the key or the marks"
        )
    places = iter(answers)
    kept = (bytes(len(part)) if part[0] and not said.get(next(places), True) else part for part in stretches)
    return b"".join(kept)


def _span_tokens(tokenizer: PreTrainedTokenizerBase, whole: str, spans: list[Span], cuts: set[int]) -> Tokens:
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
