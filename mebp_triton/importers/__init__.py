"""Readers of foreign checkpoints: a transformers model directory (with int4 weights too), a GGUF file.

A ``Source`` hands over one parameter at a time, so importing a model never needs the whole model in memory.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mebp_triton import files
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.memory import is_out_of_memory

__all__ = ["Source", "open_source"]


class Source(Protocol):
    """A checkpoint on disk.

    Attributes:
        config: what ``AutoModelForCausalLM.from_config`` needs; ``architectures`` set, nothing quantised about it.
        description: the format and the file's own name, for provenance.
    """

    config: PretrainedConfig
    description: str

    def bind(self, model: PreTrainedModel) -> None:
        """Finds every parameter of ``model`` (on the meta device is enough) in the files.

        Raises:
            ValueError: some parameters are not there, or cannot be used.
        """

    def read(self, name: str) -> Tensor | Int4Weight:
        """One parameter of the bound model, by its name in ``model.named_parameters()``, or a buffer it has.

        Returns:
            A float tensor of the parameter's own shape, or an ``Int4Weight`` whose logical ``[out, in]`` is that shape.

        Raises:
            ValueError: the file holds another shape, or cannot be read.
        """

    def has(self, name: str) -> bool:
        """Whether the bound source holds this parameter or persistent buffer. Only buffers may be absent."""

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json``, ``generation_config.json`` and the tokenizer's files, as far as there are any."""


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a directory with ``config.json`` and safetensors files (float, or 4-bit: bitsandbytes' or ours), or a GGUF.

    Raises:
        ValueError: it is neither, or something is wrong with it that shows without reading the weights.
    """
    path = Path(path)
    if path.is_dir():
        if all((path / name).exists() for name in ("manifest.json", "shared.safetensors")):
            raise ValueError(f"{path} is a store already: train it, or decode it first by `mebp merge {path} OUT`")
        from .bitsandbytes import BitsandbytesDirectory
        from .int4_dir import Int4Directory
        from .safetensors_dir import SafetensorsDirectory, quant_method_of

        quantised: tuple[type[SafetensorsDirectory], ...] = (BitsandbytesDirectory, Int4Directory)
        readers = {reader.quant_method: reader for reader in quantised}
        return readers.get(quant_method_of(path), SafetensorsDirectory)(path)
    if path.is_file() and path.suffix != ".safetensors":
        from .gguf import GgufFile

        return GgufFile(path)
    if path.exists():
        raise ValueError(f"{path} is no model: give the directory that holds config.json, or a .gguf file")
    raise ValueError(f"{path} does not exist: give a local model directory or .gguf file (hub names are not fetched)")


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever a library raises over a bad file into one ``ValueError`` line: the kinds differ by version."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        if is_out_of_memory(error):  # no fault of the file's
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{what} ({type(error).__name__}: {reason:.300}); {remedy}") from error


# Ends of the names of buffers that old checkpoints hold and models compute.
DERIVED = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
# Far above any model; what is built from a config takes memory and time for each.
MOST_LABELS, MOST_LENGTH, MOST_LAYERS = 1 << 16, 1 << 25, 1 << 12
# Settings that a weight has as a length, and those that count layers, in every architecture that has them.
LENGTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")


def read_config(path: Path, remedy: str) -> PretrainedConfig:
    """The config of a directory, or in a ``config.json``. Nothing is fetched, and none of its code runs.

    Raises:
        ValueError: it is none that this transformers can use, or its JSON is not strict.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    file = path / "config.json" if path.is_dir() else path
    content = files.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, wanted an object; {remedy}")
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        why = "needs code from the checkpoint, which is never run" if "auto_map" in content else "is not known"
        raise ValueError(f"{file}: model_type {model_type!r:.100} {why}: give an architecture this transformers has")
    if (named := _code_on_the_hub(content)) is not None:
        raise ValueError(f"{file}: {named} names code on the hub, which is never run: take it out")
    labels = content.get("num_labels", 0)
    if type(labels) is not int or labels > MOST_LABELS:  # transformers makes a name for each
        raise ValueError(f"{file}: num_labels is {labels!r:.100}; {remedy}")
    with one_line(f"{file} is not a usable config", remedy):
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
    for names, most in ((LENGTHS, MOST_LENGTH), (COUNTS, MOST_LAYERS)):
        for name in names:
            value = getattr(text, name, None)
            if type(value) is int and value > most:
                raise ValueError(f"{file}: {name} is {value!r:.100}, more than any model has; {remedy}")
    return config


def _code_on_the_hub(value: Any) -> str | None:
    """A setting such as ``attn_implementation: "owner/kernel"``, for which transformers would fetch and import code."""
    if isinstance(value, list):
        return next(filter(None, map(_code_on_the_hub, value)), None)
    if not isinstance(value, dict):
        return None
    for key, item in value.items():
        texts = item.values() if isinstance(item, dict) else [item]
        if key.endswith("_implementation") and any("/" in text for text in texts if isinstance(text, str)):
            return f"{key} {item!r:.100}"
    return next(filter(None, map(_code_on_the_hub, value.values())), None)


def check_sizes(where: str, config: PretrainedConfig, shapes: Iterable[tuple[int, ...]]) -> None:
    """ValueError where a config asks for far more than the weights have: its model could take any amount of memory."""
    known = list(shapes)
    longest = 8 * max((length for shape in known for length in shape), default=0)
    text = config.get_text_config()
    for names, most in ((LENGTHS, longest), (COUNTS, max(longest, len(known)))):
        for name in names:
            value = getattr(text, name, None)
            if type(value) is int and value > most:
                raise ValueError(
                    f"{where}: {name} is {value!r:.100}, more than the weights have: "
                    f"the weights and the config do not belong together"
                )


def prepare_config(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Names the causal language model class in ``architectures`` and drops traces of where the config came from."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    declared = config.architectures or []
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise ValueError(
            f"{where}: architectures is {declared!r}, wanted a list of class names: correct its config.json"
        )
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    causal = [name for name in declared if name.endswith(("ForCausalLM", "LMHeadModel"))]
    foreign = declared and not causal and known is not None and known.__name__ not in declared
    if getattr(config, "is_encoder_decoder", False) or known is None or foreign:
        raise ValueError(
            f"{where}: {', '.join(declared) or config.model_type} is no decoder-only language model; "
            f"give one that AutoModelForCausalLM loads"
        )
    config.architectures = [known.__name__]
    config.name_or_path = ""
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def parameter_aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every parameter's name, and all names it goes by: a tied table may be stored under any of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in groups.values()}


def persistent_buffers(model: PreTrainedModel) -> list[str]:
    """Names of the buffers that checkpoints carry."""
    kept = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in kept]


def _first(names: list[str]) -> str:
    """Three of them, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_complete(where: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    have = set(found)
    missing = [name for name in wanted if name not in have]
    if missing:
        named = _first(missing)
        raise ValueError(f"{where} lacks {named}: give a complete checkpoint of the model its config describes")


def tell_unused(where: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Warns of tensors that ``model`` has no place for, but for those that checkpoints of its kind have as well."""
    beside = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = sorted(name for name in unused if not name.endswith(DERIVED) and not name.startswith("rope_"))
    left = [name for name in left if not any(re.search(pattern, name) for pattern in beside)]
    if left:
        warnings.warn(f"{where}: the model that its config describes has no {_first(left)}: left out", stacklevel=3)


def check_shape(where: str, name: str, got: Iterable[int], wanted: Iterable[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"{where}: {name} has shape {tuple(got)}, the model wants {tuple(wanted)}: "
            f"the weights and the config do not belong together"
        )
