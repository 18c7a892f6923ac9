"""``mebp generate``: continues a prompt."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import say
from mebp_triton.cli.flags import add_inference, at_least_one

if TYPE_CHECKING:
    import torch

# Whatever the model's generation config says: a stream shows one text, whose tokens come one by one.
ONE_TEXT: dict[str, Any] = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1}
ONE_TEXT |= {"return_dict_in_generate": False, "stop_strings": None}  # the stream itself ends at those
# What asks for another way to search than sampling, or than the likeliest token.
ONE_TEXT |= dict.fromkeys(("assistant_early_exit", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"))
ONE_TEXT |= dict.fromkeys(("constraints", "force_words_ids"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system's message before the prompt, with --chat")
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=64, metavar="N", help="tokens to add at most (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="randomness of the sampling; 0 always takes the likeliest token (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of this total probability (default: 1.0)",
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the sampling (default: 42)")
    add_inference(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from mebp_triton.cli.chat_template import describe_prompt
    from mebp_triton.cli.inference import load_for_inference, load_tokenizer
    from mebp_triton.cli.starting_adapter import say_doubt
    from mebp_triton.store.reader import Store

    store = Store(arguments.store)  # refuses what is no store before the tokenizer is sought
    prompt, system = _text(arguments.prompt, "--prompt"), _text(arguments.system, "--system")
    if not prompt:
        raise ValueError("--prompt is empty")
    if system is not None and not arguments.chat:
        raise ValueError("--system needs --chat, which puts it into the tokenizer's chat template")
    if not 0 <= arguments.seed < 1 << 63:
        raise ValueError(f"--seed must lie in 0..2**63-1, got {arguments.seed}")
    tokenizer = load_tokenizer(store.directory, arguments.adapter)
    model = load_for_inference(store, arguments.adapter, arguments.device, arguments.dtype, arguments.backend)
    say_doubt(arguments.adapter, store)
    torch.manual_seed(arguments.seed)
    try:
        answer = generate(
            model,
            tokenizer,
            prompt,
            arguments.max_new_tokens,
            chat=arguments.chat,
            system=system,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            show=None if arguments.json else _print_now,
        )
    except KeyboardInterrupt:
        _print_now("" if arguments.json else "\n")
        raise
    print(json.dumps({"prompt": prompt, "completion": answer.text}) if arguments.json else "", flush=True)
    say(answer.describe())
    if arguments.chat:
        for line in describe_prompt(tokenizer, bool(arguments.adapter)):
            say(line)
    if not answer.text.strip() and not arguments.chat and tokenizer.chat_template:
        say("the answer is empty; this tokenizer has a chat template: --chat puts the prompt into it")


def _text(given: str | None, flag: str) -> str | None:
    """The text of a flag, as UTF-8 whatever the locale is. ValueError where it is none."""
    try:
        return given if given is None else os.fsencode(given).decode()
    except UnicodeError as error:
        raise ValueError(f"{flag} is not UTF-8 ({error}): convert it") from None


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


@dataclass(frozen=True)
class Answer:
    """The text that a model wrote.

    Attributes:
        text: the text behind the prompt.
        tokens: how many tokens it took, the one that ended it among them.
        ended: whether the model ended it, and not the limit of tokens.
        first, seconds: from the start to the first token, and to the last.
    """

    text: str
    tokens: int
    ended: bool
    first: float
    seconds: float

    def describe(self) -> str:
        """How fast it was and why it ended, in one line. The first token's time is the prompt's, and no token's."""
        later = self.seconds - self.first
        speed = f", then {(self.tokens - 1) / later:.1f} tokens/s" if self.tokens > 1 and later > 0 else ""
        why = "" if self.ended else "; cut off at --max-new-tokens"
        return f"{self.tokens} tokens: the first after {self.first:.2f} s{speed}{why}"


def generate_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The likeliest text that follows ``prompt``, without the prompt; see ``generate``."""
    return generate(model, tokenizer, prompt, max_new_tokens).text


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    chat: bool = False,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    show: Callable[[str], None] | None = None,
) -> Answer:
    """Continues ``prompt``.

    Args:
        chat: put the prompt into the tokenizer's chat template, as the user's message, and stop where the template
            ends an answer.
        system: the system's message before it.
        temperature: 0 for the likeliest token each time.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        show: given the text in parts, while it is made.

    Raises:
        ValueError: the prompt cannot be encoded or is too long, or a number is out of its range.
        RunError: the model's logits are not finite.
    """
    import torch

    from mebp_triton.cli.streaming import TextStream
    from mebp_triton.models.generation import stop_ids, stop_strings
    from mebp_triton.models.small_attention import small_attention_in_one_thread

    if not 0 <= temperature <= 100 or 0 < temperature < 1e-3:
        raise ValueError(f"temperature must be 0 or in [0.001, 100], got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    encoded = _encode(tokenizer, prompt, chat, system)
    encoded = {name: encoded[name].to(model.mebp.device) for name in ("input_ids", "attention_mask")}
    _check_fit(model.config.get_text_config(), encoded["input_ids"], max_new_tokens)
    stops, ends = stop_ids(model), stop_strings(model)
    if chat and (turn := _turn_end(tokenizer)) is not None:
        stop = turn.stop(stops)
        stops += [stop] if stop is not None and stop not in stops else []
        ends += [turn.text] if stop is None and turn.text else []
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stream = TextStream(tokenizer, stops, ends, show)
    with torch.no_grad(), small_attention_in_one_thread():
        output = model.generate(
            **encoded,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=stops or None,
            streamer=stream,
            logits_processor=[_check_finite],
            stopping_criteria=[stream.is_ended],
            **ONE_TEXT,
            **sampling,
        )
    ended = stream.ended or len(stream.ids) < max_new_tokens or int(output[0, -1]) in stops
    return Answer(stream.text, len(stream.ids), ended, stream.times[0], stream.times[-1])


def _turn_end(tokenizer: Any) -> Any:
    """The ``TurnEnd`` of the tokenizer's template; None if it cannot be known."""
    from mebp_triton.data.turn_end import find_turn_end

    try:
        return find_turn_end(tokenizer)
    except ValueError:  # earlier answers are left out; the one to be generated needs no template
        return None


def _encode(tokenizer: Any, prompt: str, chat: bool, system: str | None) -> Any:
    """``input_ids`` and ``attention_mask`` of the prompt, ``[1, tokens]`` each."""
    import torch

    from mebp_triton.data.template import Template
    from mebp_triton.data.text import encode, opening, with_opening
    from mebp_triton.system.foreign_errors import one_line

    if not chat:
        ids = torch.tensor([with_opening(opening(tokenizer), encode(tokenizer, prompt))])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: generate without --chat")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    way = "generate without --chat" if system is None else "leave out --system, and say it in --prompt"
    with one_line("the chat template refuses the prompt", way):
        try:
            template = Template.of(tokenizer, {})
            text = template.render(messages, header=True)
        except ValueError as error:
            raise error.__cause__ or error from None
    # Looked for by words that no template can change: it may strip, escape or split what a user says.
    shown = template.render([{**message, "content": f"the{message['role']}says"} for message in messages], header=True)
    if system is not None and "thesystemsays" not in shown:
        raise ValueError("the chat template has no place for a system's message: say it in --prompt instead")
    if "theusersays" not in shown:
        raise ValueError("the chat template writes nothing of the prompt: generate without --chat")
    ids = torch.tensor([encode(tokenizer, text)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_fit(config: Any, ids: torch.Tensor, max_new_tokens: int) -> None:
    """Raises ValueError where the model cannot take these ids ``[1, tokens]``, or not so many new ones after them."""
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives the id {int(ids.max())}, and the model has {config.vocab_size}: "
            "they do not belong together"
        )
    longest, length = getattr(config, "max_position_embeddings", None), ids.shape[1] + max_new_tokens
    if longest is not None and length > longest:
        raise ValueError(
            f"prompt and new tokens together are {length} tokens, more than the {longest} that the model takes"
        )


def _check_finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that raises RunError where logits ``[1, vocabulary]`` are NaN or infinite."""
    from mebp_triton.system.errors import RunError

    if not scores.amax(dim=-1).isfinite().all():  # a logit of -infinity is allowed: that token is left out
        raise RunError(f"the logits after {ids.shape[1]} tokens are not finite: the model or its adapter is broken")
    return scores
