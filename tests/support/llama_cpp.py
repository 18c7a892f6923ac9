"""Asks the real llama.cpp, in the package xllamacpp, what a GGUF file computes, with adapters or without.

Its C functions are called directly, which gives the logits of all positions at once. It runs in a process of its own,
because an assertion of llama.cpp ends the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

THREADS = 2


class Question(NamedTuple):
    """A GGUF file, the ids of a text, and the adapters that are applied."""

    base: Path
    ids: list[int]
    adapters: tuple[Path, ...] = ()


def log_probabilities(*questions: Question) -> list[np.ndarray]:
    """Log-probabilities over the whole vocabulary after each id: ``[positions, tokens]`` for each question."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the package xllamacpp is not installed")
    text = json.dumps([[str(base), ids, [*map(str, adapters)]] for base, ids, adapters in questions])
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, __file__, text], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    answers = io.BytesIO(done.stdout)
    return [_log_softmax(np.load(answers)) for _ in questions]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    """The mean over positions of KL(wanted || got), from log-probabilities."""
    return float((np.exp(wanted) * (wanted - got)).sum(1).mean())


class _Params(ctypes.Structure):
    """Parameters of unknown layout: passed as they come, and large enough."""

    _fields_ = [("content", ctypes.c_char * 1024)]


class _Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library() -> Any:
    """llama.cpp, with the types of the functions that are called."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("*.so"))))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Params, []),
        ("llama_context_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [text, _Params]),
        ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_adapter_lora_init", pointer, [pointer, text]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_set_n_threads", None, [pointer, number, number]),
        ("llama_set_adapters_lora", number, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_batch_init", _Batch, [number, number, number]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
    ):
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    library.llama_backend_init()
    return library


def _logits(library: Any, base: str, ids: list[int], adapters: list[str]) -> np.ndarray:
    """The logits of all positions, in float32."""
    model = library.llama_model_load_from_file(base.encode(), library.llama_model_default_params())
    assert model, f"llama.cpp cannot load {base}"
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    assert context, f"llama.cpp cannot run {base}"
    library.llama_set_n_threads(context, THREADS, THREADS)
    loaded = [library.llama_adapter_lora_init(model, adapter.encode()) for adapter in adapters]
    assert all(loaded), f"llama.cpp cannot load {adapters}"
    scales = (ctypes.c_float * len(loaded))(*[1.0] * len(loaded))
    assert library.llama_set_adapters_lora(context, (ctypes.c_void_p * len(loaded))(*loaded), len(loaded), scales) == 0
    batch = library.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert library.llama_decode(context, batch) == 0
    tokens = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = [library.llama_get_logits_ith(context, place) for place in range(len(ids))]
    logits = np.stack([np.ctypeslib.as_array(row, (tokens,)) for row in rows])
    library.llama_free(context)
    library.llama_model_free(model)
    return logits


def _main(text: str) -> None:
    """Writes the logits of all questions to standard output, where nothing else may be printed."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    library = _library()
    for question in json.loads(text):
        np.save(whole := io.BytesIO(), _logits(library, *question))
        output.write(whole.getvalue())
    output.close()


if __name__ == "__main__":
    _main(sys.argv[1])
