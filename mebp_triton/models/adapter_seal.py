"""The file of an adapter's tensors, and its seal: their checksum, what scales them, and the base model beneath them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.store.manifest import BaseModel
from mebp_triton.store.reader import Store
from mebp_triton.system import safetensors_file, strict_json
from mebp_triton.system.errors import FileError

WEIGHTS = "adapter_model.safetensors"
# The key under which the metadata of our weights has their checksum, what scales them, and the base model with the
# checksum of its weights. PEFT writes none.
SEAL = "mebp_seal"
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def write_weights(directory: Path, tensors: dict[str, Tensor], config: LoraConfig, base: BaseModel) -> None:
    """Writes an adapter's tensors, sealed with what ``config`` says of scaling and with the model beneath them."""
    seal = {
        "crc32": safetensors_file.tensors_checksum(tensors),
        "scaling": scaling_settings(config),
        "base_model": asdict(base),
    }
    safetensors_file.write_safetensors(directory / WEIGHTS, tensors, metadata={"format": "pt", SEAL: json.dumps(seal)})


def read_adapter_tensors(directory: Path | str) -> dict[str, Tensor]:
    """Reads the tensors of a saved adapter. FileError where they are damaged."""
    path = weights_of(Path(directory))
    tensors, metadata = safetensors_file.read_safetensors(path)
    seal = seal_of(path, metadata)
    if seal is not None and seal.get("crc32") != safetensors_file.tensors_checksum(tensors):
        raise FileError(f"{path} is damaged: its checksum differs")
    return tensors


def weights_of(directory: Path) -> Path:
    """The file of an adapter's tensors. FileError where there is only a pickle."""
    path = directory / WEIGHTS
    pickled = path.with_suffix(".bin")
    if pickled.exists() and not path.exists():
        raise FileError(
            f"{pickled} is a pickle, which can run code when opened: load the adapter once by PEFT where you trust it, "
            "and save it with save_pretrained as safetensors"
        )
    return path


def seal_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The seal that ``save_adapter`` wrote into the metadata of the weights; None in a file of PEFT's."""
    if SEAL not in metadata:
        return None
    seal = strict_json.parse_json(metadata[SEAL], f"{SEAL} of {path}")
    if not isinstance(seal, dict):
        raise FileError(f"{path} is damaged: its {SEAL} is not an object")
    return seal


def scaling_settings(config: LoraConfig) -> dict[str, Any]:
    """The settings that scale an adapter's tensors, which the seal repeats."""
    return {name: getattr(config, name) for name in SCALING}


def base_of_adapter(directory: Path | str) -> BaseModel | None:
    """The model beneath a saved adapter, as its seal has it; None where there is none."""
    path = weights_of(Path(directory))
    seal = seal_of(path, safetensors_file.read_safetensors_header(path)[1])
    return None if seal is None else BaseModel.from_json(path, seal.get("base_model"))


def other_base(directory: Path | str, store: Store) -> str | None:
    """Says that a saved adapter belongs to another model than the one that the store was made of.

    Returns:
        None where they are the same by the checksums of their weights, or where one of the checksums is not known.
    """
    base, own = base_of_adapter(directory), store.base
    if base is None or own is None or base.crc32 == own.crc32 or None in (base.crc32, own.crc32):
        return None
    return (
        f"the adapter {directory} was trained on {base.name_or_path}, and {store.directory} was made of other weights, "
        f"{own.name_or_path}"
    )
