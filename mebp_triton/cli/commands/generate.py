"""``mebp generate``: continues a prompt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from mebp_triton.cli.inference import load_for_inference, load_tokenizer
from mebp_triton.data.text import encode, opened, opening
from mebp_triton.store.reader import Store
from mebp_triton.system.errors import RunError
from mebp_triton.system.foreign_errors import one_line


def run(arguments: argparse.Namespace) -> None:
    store = Path(arguments.store)
    Store(store)
    if not arguments.prompt:
        raise ValueError("--prompt is empty")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.seed < 1 << 63:
        raise ValueError(f"--seed must lie in 0..2**63-1, got {arguments.seed}")
    tokenizer = load_tokenizer(store)
    model = load_for_inference(store, arguments)
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
    """The continuation alone."""
    if not 0 <= temperature <= 100 or 0 < temperature < 1e-3:
        raise ValueError(f"temperature must be 0 or in [0.001, 100], got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: generate without --chat")
        messages = [{"role": "user", "content": prompt}]
        with one_line("the chat template refuses the prompt", "generate without --chat"):
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    else:
        ids = torch.tensor([opened(encode(tokenizer, prompt), opening(tokenizer))])
        encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoded = {name: encoded[name].to(model.mebp.device) for name in ("input_ids", "attention_mask")}
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids, size = encoded["input_ids"], model.config.get_text_config().vocab_size
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    if int(ids.max()) >= size:
        raise ValueError(
            f"the tokenizer gives the id {int(ids.max())}, and the model has {size}: they do not belong together"
        )
    length = ids.shape[1] + max_new_tokens
    if longest is not None and length > longest:
        raise ValueError(
            f"prompt and new tokens together are {length} tokens, more than the {longest} that the model takes"
        )
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
            logits_processor=[_finite],
            **sampling,
        )
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def _finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if not scores.amax(dim=-1).isfinite().all():  # NaN, or infinity; -infinity alone is a token that is left out
        raise RunError(f"the logits after {ids.shape[1]} tokens are not finite: the model or its adapter is broken")
    return scores
