"""The manifest of a store: what lies in which file, and the checksums of all; see docs/store-format.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from mebp_triton.kernels.layout import SCALE_DTYPES, tensor_shapes
from mebp_triton.kernels.names import FORMS, Form, Scheme
from mebp_triton.system import reading, safetensors_file, strict_json
from mebp_triton.system.errors import FileError

FORMAT = "mebp-int4-store"
FORMAT_VERSIONS = (1, 2, 3)  # see ``format_version``
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
# Companions are the files beside the weights that are read: config.json and these.
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
DTYPES = {name: safetensors_file.DTYPES[name] for name in ("U8", "I8", "I32", "I64", "F16", "BF16", "F32", "F64")}
TWO_LEVEL = torch.int8  # the dtype of scales that have two levels


def block_file(index: int) -> str:
    """The name of the file of block ``index``."""
    return f"block-{index:05d}.safetensors"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in manifests and safetensors headers."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class BaseModel:
    """The model that a store was quantized from, as PEFT's adapters name it.

    Attributes:
        name_or_path: its name on the Hugging Face hub, or the absolute path of its directory or GGUF file.
        revision: the commit on the hub; None for a path.
        crc32: the checksum of its files of weights, see ``reading.joint_checksum``; None where it is not known. Two
            names of one model are compared without it.
    """

    name_or_path: str
    revision: str | None = None
    crc32: int | None = field(default=None, compare=False)

    @classmethod
    def from_json(cls, where: Path, entry: Any) -> BaseModel | None:
        """Reads the entry ``base_model`` of the manifest ``where``; None where there is none."""
        if entry is None:
            return None
        name, revision, crc32 = entry["name_or_path"], entry["revision"], entry.get("crc32")  # older ones have none
        if type(name) is not str or not isinstance(revision, str | None) or type(crc32) not in (int, type(None)):
            raise FileError(f"{where}: base_model is malformed: {entry!r:.300}")
        return cls(name, revision, crc32)

    def is_in(self, files: Iterable[Path]) -> bool | None:
        """Whether ``files``, which are read whole, are the model's files of weights; None where that is not known."""
        return None if self.crc32 is None else self.crc32 == reading.joint_checksum(files)


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix of codes: the file it lies in, its logical shape, and its relative distance to its source."""

    file: str
    scheme: str
    shape: tuple[int, int]
    group_size: int
    scale_dtype: str
    relative_error: float
    bits: int = 4

    @property
    def form(self) -> Form:
        return Form(cast(Scheme, self.scheme), self.group_size, self.bits)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtypes and shapes of the matrix's tensors, by the attributes of ``Int4Weight``."""
        return tensor_shapes(*self.shape, self.form, DTYPES[self.scale_dtype])

    def to_json(self) -> dict[str, Any]:
        """The entry in a manifest, which names the width of codes only where it is not 4."""
        entry = dataclasses.asdict(self)
        return {name: value for name, value in entry.items() if (name, value) != ("bits", 4)}

    @classmethod
    def from_json(cls, where: Path, name: str, entry: dict[str, Any]) -> MatrixInfo:
        """Reads the entry of matrix ``name`` in the manifest ``where``; may raise ``strict_json.MALFORMED``."""
        rows, columns = entry["shape"]
        info = cls(**{**entry, "shape": (rows, columns)})
        numbers_fit = all(type(size) is int and 0 < size < 1 << 40 for size in info.shape)
        numbers_fit &= type(info.relative_error) in (int, float)
        numbers_fit &= type(info.group_size) is int and type(info.bits) is int
        is_known = info.form in FORMS and DTYPES.get(info.scale_dtype) in (*SCALE_DTYPES, TWO_LEVEL)
        if not is_known or not numbers_fit:
            raise FileError(f"{where}: matrix {name!r:.100} is malformed: {entry!r:.300}")
        return info


def format_version(matrices: Iterable[MatrixInfo]) -> int:
    """The version of a store's format, by what older readers do not know: 2 with codes of 8 bits, 3 with two levels."""
    matrices = list(matrices)
    if any(DTYPES[info.scale_dtype] == TWO_LEVEL for info in matrices):
        return 3
    return 2 if any(info.bits != 4 for info in matrices) else 1


# --- companions -----------------------------------------------------------------------------------------------------


def companion_checksums(directory: Path, weights: Iterable[str]) -> dict[str, list[int]]:
    """Checksums of all files of a store but its manifest and its ``weights``, by their path in it."""
    own = {MANIFEST, *weights}
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: reading.file_checksums(path) for name, path in files.items() if name not in own}


def check_companions(directory: Path, companions: Mapping[str, list[int]]) -> None:
    """Compares the companions of a store with their checksums in its manifest.

    Raises:
        FileError: one of them was changed, removed or added since.
    """
    for name, crc32 in companions.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise FileError(f"{directory / MANIFEST}: {name!r:.100} is no path inside the store")
        if reading.file_checksums(directory / name) != crc32:
            raise FileError(
                f"{directory / name} is not what it was when the store was made: put it back, or, if you changed it, "
                f"take it as it is by `mebp verify --accept-changes {directory}`"
            )
    for added in (path for pattern in COMPANIONS for path in directory.glob(pattern)):
        if added.is_file() and str(added.relative_to(directory)) not in companions:
            raise FileError(
                f"{added} was not there when the store was made: remove it, or, if you put it there, take it by "
                f"`mebp verify --accept-changes {directory}`"
            )


def accept_companions(directory: Path) -> list[str]:
    """Writes the checksums of a store's companions, as they now are, into its manifest.

    Returns:
        The names of those that were changed, removed or added.
    """
    manifest = strict_json.read_sealed(directory / MANIFEST)
    before, now = manifest["companions"], companion_checksums(directory, manifest["files"])
    strict_json.write_json(directory / MANIFEST, strict_json.sealed(manifest | {"companions": now}))
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
