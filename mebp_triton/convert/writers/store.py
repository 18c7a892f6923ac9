"""Writes an int4 store, block by block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mebp_triton.kernels.layout import LAYOUT, Int4Weight
from mebp_triton.store.manifest import (
    FORMAT,
    MANIFEST,
    BaseModel,
    MatrixInfo,
    companion_checksums,
    dtype_name,
    format_version,
)
from mebp_triton.system import reading, safetensors_file, strict_json


@dataclass
class StoreWriter:
    """Writes a store into an empty directory. The manifest comes last and makes it whole.

    Attributes:
        directory: the directory.
        source: what the store was made of.
        tied_head: whether the head is the embedding.
        base: the model that adapters of the store belong to; None where no such model is known.
        files, matrices, floats: what was written so far, as the manifest has it.
    """

    directory: Path
    source: str
    tied_head: bool
    base: BaseModel | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    matrices: dict[str, MatrixInfo] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def write_file(
        self,
        name: str,
        matrices: Mapping[str, tuple[Int4Weight, float]],
        floats: Mapping[str, Tensor],
        experts: Collection[str] = (),
    ) -> None:
        """Writes one file: ``matrices`` by module name, with their relative errors, and ``floats`` by name.

        The matrices of one expert, whose names are among ``experts`` and differ in their last part, lie side by side.
        """
        tensors: dict[str, Tensor] = {key: tensor.contiguous() for key, tensor in floats.items()}
        together: dict[str, list[str]] = {}
        for module, (weight, error) in matrices.items():
            parts = weight.tensors()
            if weight.codebook is not None:
                parts["codebook"] = weight.codebook.clone()  # safetensors refuses a tensor that several matrices share
            of_matrix = {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            tensors |= of_matrix
            if module in experts:
                together.setdefault(module.rpartition(".")[0], []).extend(of_matrix)
            scheme, size, bits = weight.form
            scale_dtype = dtype_name(weight.scales.dtype)
            self.matrices[module] = MatrixInfo(name, scheme, weight.shape, size, scale_dtype, error, bits)
        path = self.directory / name
        safetensors_file.write_safetensors(path, tensors, together=list(together.values()))
        self.files[name] = {"bytes": path.stat().st_size, "crc32": reading.file_checksums(path)}
        self.floats |= dict.fromkeys(floats, name)

    def finish(self) -> None:
        """Writes the manifest, with the checksums of all that lies in the directory."""
        manifest = {
            "format": FORMAT,
            "format_version": format_version(self.matrices.values()),
            "layout": LAYOUT,
            "source": self.source,
            "tied_head": self.tied_head,
            "base_model": None if self.base is None else asdict(self.base),
            "checksum_chunk_bytes": reading.CHECKSUM_CHUNK,
            "files": self.files,
            "companions": companion_checksums(self.directory, self.files),
            "matrices": {module: info.to_json() for module, info in self.matrices.items()},
            "floats": self.floats,
        }
        strict_json.write_json(self.directory / MANIFEST, strict_json.sealed(manifest))
