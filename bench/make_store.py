"""Makes a store of random weights at a real model's shapes, with a tokenizer: everything that ``mebp train`` needs.

    python bench/make_store.py --shape qwen2.5-3b --output DIR [--scheme symmetric --group-size 64 --seed 0]
    python bench/make_store.py --config CONFIG_JSON --output DIR

Random weights cost the same time and memory as trained ones, and nothing is downloaded. The same seed gives the same
bytes. The tokenizer cuts text into pieces of one to four characters, whose ids are spread over the vocabulary.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from random_store import MIXTURES, MODELS, write_random_store
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES
from mebp_triton.models.config import prepare_config
from mebp_triton.system import atomic, reading
from mebp_triton.system.foreign_errors import one_line
from mebp_triton.system.memory import peak_resident_bytes
from mebp_triton.system.units import MIB

SHAPES = {name.lower(): settings for name, settings in (MODELS | MIXTURES).items()}
END = "<|endoftext|>"
# The characters of English text, the frequent ones first; Ġ is the space of byte-level tokenizers.
FREQUENT = "Ġetaoinshrdlcumwfgypbvkjxqz"
# A merge takes some 700 bytes while the tokenizer is loaded, a token without one 300.
MERGES = 1 << 15


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", choices=sorted(SHAPES), help="a published model")
    model.add_argument("--config", type=Path, help="a config.json, or a directory with one")
    parser.add_argument("--output", type=Path, required=True, help="the store's directory; must not exist or be empty")
    parser.add_argument("--scheme", choices=SCHEMES, default="symmetric")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64)
    parser.add_argument("--two-level", action="store_true", help="scales of a byte each, and a float16 per 256 columns")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        atomic.check_absent(chosen.output)
        config = (
            read_config(chosen.config) if chosen.config else transformers.AutoConfig.for_model(**SHAPES[chosen.shape])
        )
        torch.manual_seed(chosen.seed)
        tokenizer = make_tokenizer(config, chosen.seed)
        form = chosen.scheme, chosen.group_size
        write_random_store(config, chosen.output, torch.device("cpu"), *form, tokenizer, chosen.two_level)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in chosen.output.iterdir())
    print(
        f"{chosen.output}: {size / MIB:.0f} MiB in {time.perf_counter() - started:.1f} s, "
        f"peak resident memory {peak_resident_bytes() / MIB:.0f} MiB"
    )


def read_config(given: Path) -> Any:
    path = given / "config.json" if given.is_dir() else given
    reading.check_regular(path)
    with one_line(f"{path} is not a usable config", "give a transformers model directory or its config.json"):
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    return prepare_config(config, str(path))


def make_tokenizer(config: Any, seed: int) -> Any:
    """Makes a byte-level BPE tokenizer in which every id below ``config.vocab_size`` is a token.

    Which id a token gets is drawn. Merges join pairs of characters, then pairs of those pairs, the frequent ones first.
    Tokens beyond them are unused. The end-of-sequence token has the config's id, where the config names one.
    """
    alphabet = [*FREQUENT, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(FREQUENT))]
    size = config.get_text_config().vocab_size
    spare = size - len(alphabet) - 1
    if spare < 0:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 1} for a byte-level tokenizer, got {size}")
    pairs = frequent_pairs(alphabet[:64], min(spare, MERGES))
    merges = pairs + frequent_pairs(["".join(pair) for pair in pairs], min(spare, MERGES) - len(pairs))
    tokens = [*alphabet, *map("".join, merges)]
    tokens += [f"<unused{index}>" for index in range(size - 1 - len(tokens))]
    ids = list(range(size))
    random.Random(seed).shuffle(ids)
    wanted = config.get_text_config().eos_token_id
    end = ids.pop(ids.index(wanted) if isinstance(wanted, int) and 0 <= wanted < size else -1)
    vocabulary = dict(zip(tokens, ids, strict=True)) | {END: end}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def frequent_pairs(parts: list[str], count: int) -> list[tuple[str, str]]:
    """The first ``count`` pairs of ``parts``, ordered by the rarer of the two."""
    pairs: list[tuple[str, str]] = []
    for place, rarer in enumerate(parts):
        if len(pairs) >= count:
            break
        pairs += [(other, rarer) for other in parts[: place + 1]] + [(rarer, other) for other in parts[:place]]
    return pairs[:count]


if __name__ == "__main__":
    main()
