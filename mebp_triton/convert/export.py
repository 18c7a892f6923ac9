"""Writes a store's adapter, or the model that both make, as other programs load it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mebp_triton.convert.readers.gguf_header import Header
from mebp_triton.convert.readers.gguf_layout import GgufLayout, architecture_of
from mebp_triton.convert.readers.gguf_parts import read_model
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.convert.writers import GGUF_FLOATS
from mebp_triton.convert.writers.gguf_adapter import write_gguf_adapter
from mebp_triton.models.names import parameter_aliases
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic
from mebp_triton.system.errors import FileError


@dataclass(frozen=True)
class GgufExport:
    """A record of what was written.

    Attributes:
        base: the GGUF file whose names and keys were taken; None where the store's config gave the names.
        relative_error: the largest relative RMS error of a tensor by rounding to the type.
    """

    base: Path | None
    relative_error: float


def export_gguf_adapter(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str,
    kind: str = "F32",
    base: Path | str | None = None,
) -> GgufExport:
    """Makes a GGUF file of an adapter, for llama.cpp's ``--lora`` and Ollama's ``ADAPTER``.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        target: the file; it must not exist. It appears whole or not at all.
        adapter: a directory in PEFT's format.
        kind: the type of its tensors: "F32", "F16" or "BF16".
        base: a GGUF file of the base model; by default the one that the store was made of. Without any, names come
            from the store's config.

    Raises:
        ValueError: the adapter does not fit the store, llama.cpp would not apply all of it, or a value is too large.
    """
    target = Path(target)
    _check_target(target)
    if kind not in GGUF_FLOATS:
        raise ValueError(f"type must be one of {', '.join(GGUF_FLOATS)} for an adapter, got {kind!r}")
    source = MergedStore(store, adapter)
    model = build_skeleton(source.config, torch.float32)
    source.bind(model)
    file = _base_file(source.store, base)
    header = None if file is None else read_model(file)
    layout = _layout(source, header)
    names = _names_of_modules(layout, model)
    deltas = {site: delta for site in source.sites.values() if (delta := source.delta(site)) is not None}
    if (expert := next((site for site in deltas if site.role == "expert"), None)) is not None:
        raise ValueError(
            f"the adapter has parts for single experts ({expert.parameter}), which llama.cpp does not apply: make a "
            f"merged model of it by `mebp merge`"
        )
    if header is not None:
        for site in deltas:
            entry = header.tensors.get(names.get(site.name, ""))
            sides = [side for side in (site.out_features, site.in_features) if side != 1]
            if entry is None or [side for side in entry.shape if side != 1] != sides:
                raise ValueError(f"{file} has no matrix for {site.name}: llama.cpp could not apply the adapter to it")
    return GgufExport(file, write_gguf_adapter(target, layout, names, deltas, kind))


def _check_target(target: Path) -> None:
    if target.exists():
        raise FileError(f"{target} exists already: choose another place or remove it")
    if not target.absolute().parent.is_dir():
        raise FileError(f"{target} names no file in an existing directory: make {target.parent} first")
    atomic.check_place(target.parent)


def _base_file(store: Store, given: Path | str | None) -> Path | None:
    """The GGUF file of the base: the one given, or the one that the store was made of if it is still there."""
    if given is not None:
        return Path(given)
    path = Path(store.base.name_or_path) if store.base is not None else None
    return path if path is not None and path.suffix == ".gguf" and path.is_file() else None


def _layout(source: MergedStore, header: Header | None) -> GgufLayout:
    """The layout of the base's files, by its header or by the store's config.

    Raises:
        ValueError: the architecture is not known, or the header is of another one than the store.
    """
    own = architecture_of(source.config.model_type)
    if header is not None and (stated := header.metadata.get("general.architecture")) != own:
        raise ValueError(f"{header.path} is of architecture {stated!r:.100}, and the store is a {own}: give its base")
    return GgufLayout(own, source.config, f"store {source.directory}")


def _names_of_modules(layout: GgufLayout, model: Any) -> dict[str, str]:
    """GGUF's names of matrices by the paths of their modules; of those that one tensor is."""
    first = {alias: name for name, aliases in parameter_aliases(model).items() for alias in aliases}
    names = layout.names(model)
    tensors = Counter(names.values())
    weights = ((first.get(name, name), gguf_name) for gguf_name, name in names.items() if tensors[name] == 1)
    return {name.removesuffix(".weight"): gguf_name for name, gguf_name in weights if name.endswith(".weight")}
