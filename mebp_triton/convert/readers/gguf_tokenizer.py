"""Makes the tokenizer of a GGUF file split, begin and end texts as llama.cpp does.

The vocabulary and its merges come from transformers. How a text is cut into words before the merges, and which tokens
begin and end it, a file states in keys that transformers reads in part, or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mebp_triton.system.memory import return_free_memory

from .gguf_header import DOWNLOAD, Length
from .gguf_keys import is_number

# What llama.cpp takes where a file with this kind of vocabulary does not say.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}
# Kinds of words whose vocabularies llama.cpp begins with a BOS, and whose whole words need no merges.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
LLAMA3 = WHOLE_WORDS - {"tekken"} | {"dbrx", "smaug-bpe", "chatglm-bpe"}
QWEN2 = {"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"}
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
GPT2 = {"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}
BLOOM = {"bloom", "poro-chat", "gpt3-finnish"}
# Tokens that end a turn or a text, by their own text: llama.cpp stops at them whether a key names them or not.
ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}
ENDS |= {"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"}
ENDS |= {"<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~[", "<｜end▁of▁sentence｜>"}
KEYS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def check_tokens(metadata: dict[str, Any], where: str) -> None:
    """Raises ValueError where a key names a token that the file does not have."""
    count = metadata.get("tokenizer.ggml.tokens")
    if count is None:
        return
    if not isinstance(count, Length):
        raise ValueError(f"{where}: tokenizer.ggml.tokens is {count!r:.100}, wanted a list of texts; {DOWNLOAD}")
    for name in (*KEYS.values(), "unknown", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key, 0)
        if not is_number(value) or not 0 <= value < max(count, 1):
            raise ValueError(f"{where}: {key} is {value!r:.100} of {count} tokens; give the model as safetensors")


def token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text, under a config's names; none that the file lacks."""
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in KEYS.items()}
    ids = dict(SENTENCEPIECE_IDS) if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids |= {name: metadata[key] for name, key in keys.items() if key in metadata}
    return {f"{name}_token_id": value for name, value in ids.items()}


def generation_config(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Any]) -> GenerationConfig:
    """The generation config, which stops at every token that the file says ends a turn or a text."""
    ids: dict[str, Any] = token_ids(metadata)
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[text] for text in ENDS if text in vocabulary]
    ends = [end for end in (ids.get("eos_token_id"), *stated, *sorted(known)) if end is not None]
    if ends:
        ids["eos_token_id"] = list(dict.fromkeys(ends)) if len(set(ends)) > 1 else ends[0]
    return GenerationConfig(**ids)


def tokenizer_of(path: Path, metadata: dict[str, Any], where: str) -> PreTrainedTokenizerFast:
    """The tokenizer that the GGUF file ``path`` describes.

    It warns where texts are cut by a rule that is not known here.
    """
    # transformers would prefer the tokenizer of another model that lies beside the file.
    with tempfile.TemporaryDirectory() as alone:
        file, saved = Path(alone, "model.gguf"), Path(alone, "saved.json")
        os.symlink(path.resolve(), file)
        options, template = _save_backend(file, saved, metadata, where)
        return_free_memory()  # hundreds of MB for a large vocabulary, of which the tokenizer makes more copies
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(saved), **options)
    tokenizer.chat_template = template
    return tokenizer


def _save_backend(file: Path, target: Path, metadata: dict[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """Writes what cuts texts and numbers tokens, from the tokenizer that transformers makes of the file.

    Returns:
        The other settings of the tokenizer, and its chat template.
    """
    # AutoTokenizer would read the whole header once more, for a class that makes the same of it.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
    backend = _of_the_file(tokenizer.backend_tokenizer, int(metadata["tokenizer.ggml.tokens"]))
    kind = str(metadata.get("tokenizer.ggml.pre", "default"))
    begins = False
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        begins = backend.model.ignore_merges = kind in WHOLE_WORDS
        backend.decoder = decoders.ByteLevel()
        words = _words(kind)
        if words is not None:
            backend.pre_tokenizer = words
        elif kind not in _known_to_transformers():
            warnings.warn(
                f"{where}: tokenizer.ggml.pre is {kind!r:.100}, which is not known here: texts are cut into words as "
                "GPT-2 does, and may get other ids than in llama.cpp; take the tokenizer's files from the original "
                "model",
                stacklevel=4,
            )
    elif metadata.get("tokenizer.ggml.model") == "llama":
        begins = True
        _set_prefix(backend, metadata)
    names = {name.removesuffix("_id"): index for name, index in token_ids(metadata).items()}
    if "tokenizer.ggml.unknown_token_id" in metadata:
        names["unk_token"] = metadata["tokenizer.ggml.unknown_token_id"]
    tokens = {name: backend.id_to_token(index) for name, index in names.items()}
    first = (
        [tokens["bos_token"]] if metadata.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in tokens else []
    )
    last = [tokens["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token") and "eos_token" in tokens else []
    special = [(tokens[name], names[name]) for name in names if tokens[name] in first + last]
    backend.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=special)
    # transformers 4 would take spaces before commas out of decoded texts.
    nothing: dict[str, Any] = {"bos_token": None, "eos_token": None, "clean_up_tokenization_spaces": False}
    backend.save(str(target), pretty=False)
    return nothing | tokens, tokenizer.chat_template


def _of_the_file(backend: Tokenizer, size: int) -> Tokenizer:
    """``backend`` without the tokens that transformers adds behind the ``size`` ones of the file.

    The model has no rows for them.
    """
    if all(index < size for index in backend.get_added_tokens_decoder()):
        return backend  # the usual case, without a copy of a vocabulary in Python's objects
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(state))


def _words(kind: str) -> pre_tokenizers.PreTokenizer | None:
    """How a byte-level vocabulary of ``kind`` cuts a text into words; None if that is not known here."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in QWEN2:
        return _split(PRETOKENIZE_REGEX)
    if kind in LLAMA3:  # numbers in groups of three digits, not one by one
        return _split(PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    if kind in GPT2:
        return gpt2
    if kind in DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if kind in BLOOM:
        return _split(r" ?[^(\s|.,!?…。，、।۔،)]+")
    if kind == "falcon":
        return _split(r"[\p{P}$+<=>^~|`]+", _GPT2_WORDS, r"[0-9][0-9][0-9]")
    if kind == "deepseek-v3":
        return _split(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)
    if kind == "default":
        return _split(r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")
    return None


# Contractions, letters, numbers, signs, each with a space before it; then what is left of a run of spaces.
_GPT2_WORDS = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A sign with the letters behind it, letters with one other character before them, signs, and then what is left.
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cuts at each of ``patterns`` in turn, and writes bytes as letters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _known_to_transformers() -> set[str]:
    """The kinds that transformers 5 cuts by itself; 4 knows none."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _set_prefix(backend: Any, metadata: dict[str, Any]) -> None:
    """Puts a space before a text that begins with a word or a space alike, or before none."""
    if str(metadata.get("general.architecture")).startswith("gemma"):
        return  # transformers' own Gemma has no such space
    space = normalizers.Replace(" ", "▁")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
