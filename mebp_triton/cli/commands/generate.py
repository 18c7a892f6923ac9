"""``mebp generate``: continues a prompt."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.flags import add_inference, at_least_one

if TYPE_CHECKING:
    import torch


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store made by mebp quantize")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
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
    import transformers

    from mebp_triton.cli.inference import load_for_inference, load_tokenizer
    from mebp_triton.store.reader import Store

    store = Store(arguments.store)  # refuses what is no store before the tokenizer is sought
    if not arguments.prompt:
        raise ValueError("--prompt is empty")
    if not 0 <= arguments.seed < 1 << 63:
        raise ValueError(f"--seed must lie in 0..2**63-1, got {arguments.seed}")
    tokenizer = load_tokenizer(store.directory, arguments.adapter)
    model = load_for_inference(store, arguments.adapter, arguments.device, arguments.dtype, arguments.backend)
    torch.manual_seed(arguments.seed)
    streamer = None if arguments.json else transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    text = generate_text(
        model,
        tokenizer,
        arguments.prompt,
        arguments.max_new_tokens,
        chat=arguments.chat,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        streamer=streamer,
    )
    if arguments.json:
        print(json.dumps({"prompt": arguments.prompt, "completion": text}))


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    chat: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
) -> str:
    """The text that follows ``prompt``, without the prompt.

    Args:
        chat: put the prompt into the tokenizer's chat template, as the user's message.
        temperature: 0 for the likeliest token each time.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        streamer: given the text while it is made.

    Raises:
        ValueError: the prompt cannot be encoded or is too long, or a number is out of its range.
        RunError: the model's logits are not finite.
    """
    import torch

    if not 0 <= temperature <= 100 or 0 < temperature < 1e-3:
        raise ValueError(f"temperature must be 0 or in [0.001, 100], got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    encoded = _encode(tokenizer, prompt, chat)
    encoded = {name: encoded[name].to(model.mebp.device) for name in ("input_ids", "attention_mask")}
    _check_fit(model.config.get_text_config(), encoded["input_ids"], max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        output = model.generate(
            **encoded,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            logits_processor=[_check_finite],
            **sampling,
        )
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """``input_ids`` and ``attention_mask`` of the prompt, ``[1, tokens]`` each."""
    import torch

    from mebp_triton.data.text import encode, opening, with_opening
    from mebp_triton.system.foreign_errors import one_line

    if not chat:
        ids = torch.tensor([with_opening(opening(tokenizer), encode(tokenizer, prompt))])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: generate without --chat")
    messages = [{"role": "user", "content": prompt}]
    with one_line("the chat template refuses the prompt", "generate without --chat"):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


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
