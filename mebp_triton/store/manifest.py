"""The store on disk: a manifest, one safetensors file per block, one for the rest; see docs/store-format.md.

``StoreWriter`` makes one, block by block; ``Store`` opens one and checks all that can be checked without
reading the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mebp_triton.kernels.layout import SCALE_DTYPES
from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES
from mebp_triton.system import reading, safetensors_file, strict_json
from mebp_triton.system.errors import FileError

FORMAT = "mebp-int4-store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
# What lies beside the weights and is read, but for config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
# What looking into JSON of another form than expected raises.
MALFORMED = (KeyError, TypeError, AttributeError, ValueError)
DTYPES = {name: safetensors_file.DTYPES[name] for name in ("U8", "F16", "BF16", "F32", "F64")}


def block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


@dataclass(frozen=True)
class MatrixInfo:
    """One int4 matrix: the file it lies in, its logical shape, and how far it is from its source."""

    file: str
    scheme: str
    shape: tuple[int, int]
    group_size: int
    scale_dtype: str
    relative_error: float


def companion_checksums(directory: Path, weights: Iterable[str]) -> dict[str, list[int]]:
    """Of the config, the tokenizer's files and all else that lies beside the weights."""
    own = {MANIFEST, *weights}
    found = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: reading.file_checksums(path) for name, path in found.items() if name not in own}


def accept_companions(directory: Path) -> list[str]:
    """Takes the companions of a store as they now are; the names of those that are not as the manifest says."""
    manifest = strict_json.read_sealed(directory / MANIFEST)
    before, now = manifest["companions"], companion_checksums(directory, manifest["files"])
    strict_json.write_json(directory / MANIFEST, strict_json.sealed(manifest | {"companions": now}))
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def matrix_info(where: Path, name: str, entry: dict[str, Any]) -> MatrixInfo:
    rows, columns = entry["shape"]
    info = MatrixInfo(**{**entry, "shape": (rows, columns)})
    numbers_fit = all(type(size) is int and 0 < size < 1 << 40 for size in info.shape)
    numbers_fit &= type(info.relative_error) in (int, float)
    numbers_fit &= type(info.group_size) is int and info.group_size in GROUP_SIZES
    if info.scheme not in SCHEMES or DTYPES.get(info.scale_dtype) not in SCALE_DTYPES or not numbers_fit:
        raise FileError(f"{where}: matrix {name!r:.100} is malformed: {entry!r:.300}")
    return info


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
