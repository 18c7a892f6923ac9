"""Generates as a peer of ``generation.py`` does, in a process of its own that loads no more than the peer needs.

    python bench/generation_peer.py {transformers,llama.cpp} MODEL PROMPT TOKENS THREADS

Prints tokens per second after the first one, the seconds from then to the end, and the text, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def by_transformers(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    times: list[float] = []

    class Times(BaseStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.generation_config.eos_token_id = None
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = network.generate(
            **ids, max_new_tokens=tokens, do_sample=False, streamer=Times(), pad_token_id=tokenizer.eos_token_id
        )
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    _, first, *_, last = times  # the prompt comes first
    later = time.perf_counter() - first
    return {"tokens_per_second": (tokens - 1) / (last - first), "later_seconds": later, "text": text.strip()}


def by_llama_cpp(model: str, prompt: str, tokens: int, threads: int) -> dict[str, Any]:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = model
    options.n_ctx, options.n_parallel, options.n_gpu_layers, options.verbosity = 512, 1, 0, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    options.warmup = options.fit_params = False
    server = xllamacpp.Server(options)
    request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if answer["timings"]["predicted_n"] != tokens:
        raise RuntimeError(f"not {tokens} tokens: {answer['timings']}")
    later = answer["timings"]["predicted_ms"] / 1000  # it counts from the first token
    text = answer["choices"][0]["text"].strip()
    return {"tokens_per_second": (tokens - 1) / later, "later_seconds": later, "text": text}


def main() -> None:
    side, model, prompt, tokens, threads = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may stand on standard output
    if side == "llama.cpp":
        found = by_llama_cpp(model, prompt, int(tokens), int(threads))
    else:
        found = by_transformers(model, prompt, int(tokens))
    output.write(json.dumps(found))
    output.close()


if __name__ == "__main__":
    main()
