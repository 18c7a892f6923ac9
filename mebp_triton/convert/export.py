"""Writes a store's adapter, or the model that both make, as other programs load it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mebp_triton.convert.readers.gguf import GgufFile
from mebp_triton.convert.readers.gguf_header import Header
from mebp_triton.convert.readers.gguf_layout import GgufLayout, architectures_of
from mebp_triton.convert.readers.gguf_parts import read_model
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.convert.writers import GGUF_FLOATS, GGUF_TYPES
from mebp_triton.convert.writers.gguf_adapter import write_gguf_adapter
from mebp_triton.convert.writers.gguf_file import check_kind
from mebp_triton.convert.writers.gguf_model import TEMPLATE, GgufModelReport, GgufModelWriter
from mebp_triton.convert.writers.peft_adapter import rank_limit, write_served_adapter
from mebp_triton.models.adapter import CHAT_TEMPLATE
from mebp_triton.models.adapter_directory import CONFIG
from mebp_triton.models.config import read_json_object
from mebp_triton.models.generation import GENERATION_CONFIG, saved_stops
from mebp_triton.models.language_part import parts_left_out
from mebp_triton.models.names import names_in
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.manifest import BaseModel
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic
from mebp_triton.system.errors import FileError

END_OF_TURN = "tokenizer.ggml.eot_token_id"
ENDS = (END_OF_TURN, "tokenizer.ggml.eos_token_id")


@dataclass(frozen=True)
class GgufExport:
    """A record of what was written.

    Attributes:
        base: the GGUF file whose names and keys were taken; None where the store's config gave the names.
        relative_error: the largest relative RMS error of a tensor by rounding to the type.
        changed: whether that file is where the store's base was, with other content.
    """

    base: Path | None
    relative_error: float
    changed: bool = False


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
    source, model = _bound(store, adapter)
    file = _base_file(source.store, base)
    header = None if file is None else read_model(file)
    layout = _layout(source, header)
    parameters = _parameters(layout, source, model)
    parts = _parts(source, parameters, header)
    deltas = {site: delta for site in source.sites.values() if (delta := source.delta(site)) is not None}
    if (expert := next((site for site in deltas if site.role == "expert"), None)) is not None:
        raise ValueError(
            f"the adapter has parts for single experts ({expert.parameter}), which llama.cpp does not apply: make a "
            f"merged model of it by `mebp merge`"
        )
    for site in deltas:
        if header is not None and sum(parts.get(site.name, {}).values()) != site.out_features:
            raise ValueError(
                f"{file} has no matrix for {site.name} of {site.out_features} x {site.in_features}, so llama.cpp could "
                f"not apply the adapter to it: give a GGUF file of the store's own model"
            )
    own = source.store.base if base is None else None
    changed = own is not None and header is not None and own.is_in(header.files) is False
    return GgufExport(file, write_gguf_adapter(target, layout, parts, deltas, kind), changed)


def export_gguf_model(
    store: Store | Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    kind: str = "F16",
    base: Path | str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[GgufModelReport, list[int]]:
    """Makes a GGUF file of a store with its adapter merged in.

    Matrices are the store's, ``W + scaling * B @ A``, rounded once to the type. All else is copied from a GGUF file of
    the base model: keys, tokenizer, experts and other tensors, and, unless the type is a float, matrices that were
    taken over bit for bit and that the adapter does not change. The chat template is the adapter's if it has one, and
    so is a token that ends an answer.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        target: the file; it must not exist. It appears whole or not at all.
        adapter: a directory in PEFT's format; None for the store's own weights.
        kind: one of ``GGUF_TYPES``. Rows that are not made of whole blocks get the type that llama.cpp takes then.
        base: a GGUF file of the base model, in any type; by default the one that the store was made of.
        progress: called with (tensors done, tensors in all).

    Returns:
        The report, and the tokens at which the adapter stops and the file has no key for.

    Raises:
        ValueError: the adapter or the base does not fit the store, there is no base, or a value is too large.
    """
    target = Path(target)
    _check_target(target)
    if kind not in GGUF_TYPES:
        raise ValueError(f"type must be one of {', '.join(GGUF_TYPES)}, got {kind!r}")
    check_kind(kind)
    source, model = _bound(store, adapter)
    file = _base_file(source.store, base)
    if file is None:
        known = source.store.base
        gone = "" if known is None or not known.name_or_path.endswith(".gguf") else f" ({known.name_or_path}: gone)"
        raise ValueError(
            f"store {source.directory} was made of {source.store.source}{gone}, and a GGUF file needs keys and a "
            "tokenizer from another one: give a GGUF file of the base model by --base"
        )
    header = read_model(file)
    layout = _layout(source, header)
    opened = GgufFile(file)
    opened.bind(model)
    replaced, left = _ends_and_template(source, header)
    parameters = _parameters(layout, source, model)
    known = source.store.base
    trusted = known is not None and known.is_in(header.files) is True
    writer = GgufModelWriter(source, opened, header, layout, parameters, kind, trusted)
    return writer.write(target, replaced, progress), left


@dataclass(frozen=True)
class PeftExport:
    """A record of what was written for vLLM and SGLang.

    Attributes:
        base: the model that the adapter belongs to.
        rank: the rank of all modules.
        rank_limit: the least ``--max-lora-rank`` of vLLM that it needs.
        made_equal: whether ranks or scalings differed between modules.
        rounded: how many of the store's matrices are not the base's own values, and the largest relative error.
    """

    base: BaseModel
    rank: int
    rank_limit: int
    made_equal: bool
    rounded: tuple[int, float]


def export_peft_adapter(store: Store | Path | str, target: Path | str, adapter: Path | str) -> PeftExport:
    """Makes an adapter directory that vLLM and SGLang serve as it was trained, on the base that the store was made of.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        target: must not exist, or be empty. It appears whole or not at all.
        adapter: a directory in PEFT's format.

    Raises:
        ValueError: the adapter does not fit the store, its rank is too large, or the store's base is not known.
    """
    target = Path(target)
    atomic.check_absent(target)
    source, model = _bound(store, adapter)
    base = source.store.base
    if base is None:
        raise ValueError(
            f"store {source.directory} does not say what it was made of, so no server could be told the base: "
            "quantize the base model again, or merge the adapter by `mebp merge`"
        )
    changed = [(site, delta) for site in source.sites.values() if (delta := source.delta(site)) is not None]
    if experts := [site.name for site, _ in changed if site.role == "expert"]:
        raise ValueError(f"the adapter changes experts ({experts[0]}), which is not known to be served: merge it")
    deltas = {site.name: delta for site, delta in changed}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    # What was left out of a model for text and images may have layers of the same names.
    every = None if parts_left_out(model) else layers
    values = read_json_object(Path(adapter) / CONFIG, "save the adapter again")
    with atomic.atomic_directory(target) as directory:
        rank, made_equal = write_served_adapter(directory, values, deltas, every, base)
        for name in (CHAT_TEMPLATE, GENERATION_CONFIG):
            if (Path(adapter) / name).is_file():
                shutil.copyfile(Path(adapter) / name, directory / name)
    errors = [info.relative_error for info in source.store.matrices.values() if info.relative_error > 0]
    return PeftExport(base, rank, rank_limit(rank), made_equal, (len(errors), max(errors, default=0.0)))


def _ends_and_template(source: MergedStore, header: Header) -> tuple[dict[str, str | int], list[int]]:
    """The keys by which a file says what the adapter has learnt of templates and ends; and ends without a key."""
    replaced: dict[str, str | int] = {}
    template = None if source.adapter is None else Path(source.adapter) / CHAT_TEMPLATE
    if template is not None and template.is_file():
        replaced[TEMPLATE] = template.read_text(encoding="utf-8")
    known = {*saved_stops(source.directory), *(header.metadata.get(key) for key in ENDS)}
    ends = [token for token in source.stops if token not in known]
    if ends and END_OF_TURN not in header.metadata:
        replaced[END_OF_TURN] = ends.pop(0)
    return replaced, ends


def _bound(store: Store | Path | str, adapter: Path | str | None) -> tuple[MergedStore, Any]:
    """The store with its adapter, and the model without weights that it is bound to."""
    source = MergedStore(store, adapter)
    model = build_skeleton(source.config, torch.float32)
    source.bind(model)
    return source, model


def _check_target(target: Path) -> None:
    if target.exists():
        raise FileError(f"{target} exists already: choose another place or remove it")
    if not target.absolute().parent.is_dir():
        remedy = f"{target.parent} is a file" if target.parent.exists() else f"make {target.parent} first"
        raise FileError(f"{target} names no file in an existing directory: {remedy}")
    atomic.check_place(target.parent)


def _base_file(store: Store, given: Path | str | None) -> Path | None:
    """The GGUF file of the base: the one given, or the one that the store was made of if it is still there."""
    if given is not None:
        if not Path(given).is_file():
            what = "is a directory" if Path(given).is_dir() else "is no file"
            raise FileError(f"--base {given} {what}: give a GGUF file of the base model")
        return Path(given)
    path = Path(store.base.name_or_path) if store.base is not None else None
    return path if path is not None and path.suffix == ".gguf" and path.is_file() else None


def _layout(source: MergedStore, header: Header | None) -> GgufLayout:
    """The layout of the base's files, by its header or by the store's config.

    Raises:
        ValueError: the architecture is not known, or the header is of another one than the store.
    """
    config = source.config.get_text_config()  # files have the language model of a larger one alone
    known = architectures_of(config.model_type)
    stated = known[0] if header is None else header.metadata.get("general.architecture")
    if header is not None and stated not in known:
        raise ValueError(
            f"{header.path} is of architecture {stated!r:.100}, and the store is a {known[0]}: give its base"
        )
    return GgufLayout(str(stated), config, f"store {source.directory}")


def _parts(source: MergedStore, parameters: Mapping[str, str], header: Header | None) -> dict[str, dict[str, int]]:
    """The tensors that the matrix of each module is in a file, with their rows, by the paths of the modules.

    Without a header, those are known that can only be one.
    """
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in parameters.items():
        site = source.sites.get(parameter)
        if site is None or site.role == "expert":
            continue
        entry = None if header is None else header.tensors.get(name)
        if header is None:
            parts.setdefault(site.name, {})[name] = site.out_features
        elif entry is not None and (shape := (1,) * (2 - len(entry.shape)) + entry.shape)[1:] == (site.in_features,):
            parts.setdefault(site.name, {})[name] = shape[0]
    return {name: found for name, found in parts.items() if header is not None or len(found) == 1}


def _parameters(layout: GgufLayout, source: MergedStore, model: Any) -> dict[str, str]:
    """The names that the store has parameters by, by GGUF's names."""
    known = names_in(model, {*(site.parameter for site in source.sites.values()), *source.store.floats})
    return {gguf: known.get(name, name) for gguf, name in layout.names(model).items()}
