"""Asks llama.cpp what it computes of tiny GGUF files, for ``tests/convert/readers/test_gguf_architectures.py``.

The files are those of ``tests/support/gguf_models.py``: each architecture with each key that changes a function, in
float32; and those of ``gguf_vocabularies.py``. Needs ``pip install xllamacpp gguf``, not torch nor this package.
A file that llama.cpp refuses has null; one whose logits are the plain file's has "plain".

    python bench/gguf_reference.py bench/results/gguf-llama-cpp.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from gguf_models import IDS, LENGTHS, MODELS, PROMPT, VOCAB, variants, write_variant
from gguf_vocabularies import TEXTS, VOCABULARIES, write_vocabulary

DIGITS = 5


def log_probabilities(file: str) -> list[list[float]]:
    """Log-probabilities of ``IDS`` after each of ``LENGTHS`` tokens of the prompt, with float32 keys and values."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = file
    options.n_ctx, options.n_parallel, options.cpuparams.n_threads = 128, 1, 1
    options.warmup = options.fit_params = False
    options.n_gpu_layers, options.verbosity = 0, -1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(options)
    result = []
    for length in LENGTHS:
        # A token that is no whole letter has no probabilities in the answer, so a letter is forced; the
        # probabilities are those before.
        answer = server.handle_completions(
            {"prompt": PROMPT[:length], "n_predict": 1, "n_probs": VOCAB, "logit_bias": [[44, 1000.0]]}
            | {"temperature": 0, "cache_prompt": False}
        )
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        by_id = {entry["id"]: entry["logprob"] for entry in found}
        result.append([round(by_id[index], DIGITS) for index in IDS])
    return result


class _Params(ctypes.Structure):
    """llama.cpp's parameters of a model, of unknown layout: passed as they come, and large enough."""

    _fields_ = [("content", ctypes.c_char * 1024)]


def token_ids(files: list[str]) -> list[dict[str, Any]]:
    """The ids of ``TEXTS`` and the tokens that end a text, for each file."""
    import xllamacpp

    library = ctypes.CDLL(next(str(path) for path in Path(xllamacpp.__file__).parent.glob("*.so")))
    library.llama_model_default_params.restype = _Params
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    for name in ("llama_model_get_vocab", "llama_vocab_n_tokens"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_vocab_is_eog.argtypes, library.llama_vocab_is_eog.restype = (
        [ctypes.c_void_p, ctypes.c_int32],
        ctypes.c_bool,
    )
    pointer = ctypes.POINTER(ctypes.c_int32)
    flags = [ctypes.c_bool, ctypes.c_bool]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        pointer,
        ctypes.c_int32,
        *flags,
    ]
    library.llama_backend_init()
    result = []
    for file in files:
        model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
        vocabulary = library.llama_model_get_vocab(model)
        ids = []
        for text in TEXTS:
            room = (ctypes.c_int32 * 1000)()
            content = text.encode()
            count = library.llama_tokenize(vocabulary, content, len(content), room, 1000, True, True)
            ids.append(list(room[:count]))
        size = library.llama_vocab_n_tokens(vocabulary)
        result.append({"ids": ids, "ends": [i for i in range(size) if library.llama_vocab_is_eog(vocabulary, i)]})
    return result


def work(files: list[Path]) -> None:
    """Writes the log-probabilities of each file beside it; null where llama.cpp raises."""
    for file in files:
        try:
            found: Any = log_probabilities(str(file))
        except RuntimeError:
            found = None
        file.with_suffix(".json").write_text(json.dumps(found))


def all_probabilities(folder: Path, arch: str) -> dict[str, Any]:
    files = {name: folder / f"{arch}-{index}.gguf" for index, name in enumerate(variants(arch))}
    for name, file in files.items():
        write_variant(file, arch, name)
    todo = list(files.values())
    while todo:  # an assertion of llama.cpp ends the process
        quiet = {"stderr": subprocess.DEVNULL, "env": os.environ | {"GGML_NO_BACKTRACE": "1"}}
        subprocess.run([sys.executable, __file__, "--work", *map(str, todo)], **quiet)
        if missing := [file for file in todo if not file.with_suffix(".json").exists()]:
            missing.pop(0).with_suffix(".json").write_text("null")
        todo = missing
    found = {name: json.loads(file.with_suffix(".json").read_text()) for name, file in files.items()}
    plain = found["plain"]
    return {name: "plain" if value == plain and name != "plain" else value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--work", nargs="+", type=Path, help=argparse.SUPPRESS)
    if sys.argv[1:2] == ["--work"]:
        return work([Path(file) for file in sys.argv[2:]])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            label: write_vocabulary(folder / f"{index}.gguf", keys)
            for index, (label, keys) in enumerate(VOCABULARIES.items())
        }
        texts = dict(zip(files, token_ids([str(file) for file in files.values()]), strict=True))
        logits = {arch: all_probabilities(folder, arch) for arch in MODELS}
    parts = [f'"xllamacpp": "{version("xllamacpp")}"']
    for label, groups in (("texts", {"": texts}), ("logits", logits)):
        for arch, rows in groups.items():
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
            parts.append(f"{json.dumps(f'{label} {arch}'.strip())}: {{\n{lines}\n}}")
    args.out.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
