"""Readers of foreign checkpoints: a transformers model directory (with int4 weights too), a GGUF file.

A ``Source`` hands over one parameter at a time, so importing a model never needs the whole model in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mebp_triton.kernels.layout import Int4Weight

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
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{what} ({type(error).__name__}: {reason}); {remedy}") from error


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


def check_complete(where: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    have = set(found)
    missing = [name for name in wanted if name not in have]
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{where} lacks {named}: give a complete checkpoint of the model its config describes")


def check_shape(where: str, name: str, got: Iterable[int], wanted: Iterable[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"{where}: {name} has shape {tuple(got)}, the model wants {tuple(wanted)}: "
            f"the weights and the config do not belong together"
        )
