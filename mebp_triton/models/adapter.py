"""Reads and writes adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.layers.experts import ExpertAdapter
from mebp_triton.layers.lora_config import LoraConfig, lora_config_from_file
from mebp_triton.system import atomic, safetensors_file, strict_json
from mebp_triton.system.errors import FileError

from .adapter_config import adapter_layers, base_of, peft_config, with_patterns_of_weights
from .adapter_directory import CONFIG
from .adapter_seal import (
    other_base,
    read_adapter_tensors,
    scaling_settings,
    seal_of,
    weights_of,
    write_weights,
)
from .config import read_json_object
from .experts import FusedExperts
from .generation import add_stops, saved_stops, write_stops
from .names import enumerate_names

# Lies beside the adapter where it was trained with another chat template than the tokenizer's.
CHAT_TEMPLATE = "chat_template.jinja"
PREFIX = "base_model.model."


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names: A ``[R, K]``, B ``[N, R]``; of experts, see ``ExpertAdapter``."""
    tensors = {}
    for name, layer in adapter_layers(model).items():
        path = peft_path(name, layer.nested) if isinstance(layer, ExpertAdapter) else name
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach()
    return tensors


def peft_path(parameter: str, nested: bool) -> str:
    """The path at which PEFT has the adapter of a parameter: around its module, or around what that wraps."""
    module = parameter.rpartition(".")[0]
    return f"{module}.base_layer" if nested else module


def expert_adapters(config: LoraConfig, experts: Iterable[FusedExperts]) -> dict[str, tuple[str, FusedExperts]]:
    """The paths at which PEFT has the adapters of experts, by the path of their parameter."""
    found: dict[str, tuple[str, FusedExperts]] = {}
    for one in experts:
        paths = [f"{one.path}.{name}" for name in one.shapes if config.targets_parameter(f"{one.path}.{name}")]
        found |= {path: (peft_path(path, path != paths[-1]), one) for path in paths}
    return found


def save_adapter(model: Any, directory: Path | str) -> None:
    """Writes the adapter of ``model`` into ``directory`` as PEFT would. Each file replaces an older one whole.

    A generation config stands beside it where the model was trained to stop at tokens at which its store does not.

    Raises:
        ValueError: the model has no adapter of ours, or one that is not finite; or its embedding was resized; or the
            directory cannot be made.
    """
    config = _config_of(model)
    if config is None:
        raise ValueError("the model has no adapter of ours to save: make it with lora=LoraConfig(...)")
    if hasattr(model, "mebp"):
        _check_embedding(model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ValueError(f"{broken} is not finite: the adapter is not written")
    directory = Path(directory)
    atomic.check_place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = with_patterns_of_weights(config, model)
    write_weights(directory, tensors, config, base_of(model)[0])
    strict_json.write_json(directory / CONFIG, peft_config(config, model))
    if hasattr(model, "mebp") and model.mebp.stops:
        write_stops(directory, model.mebp.store.directory, model.mebp.stops)


def _check_embedding(model: Any) -> None:
    """ValueError where the embedding has other rows than the store: an adapter's files have no place for them."""
    table = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is table)
    stored, rows = model.mebp.store.matrices[path].shape[0], table.weight.shape[0]
    if rows != stored:
        raise ValueError(
            f"{path} has {rows} tokens, in the store {stored}, and an adapter's files have no place for the new ones: "
            f"load without lora, and train by PEFT (get_peft_model), which saves the rows"
        )


def _config_of(model: Any) -> LoraConfig | None:
    """The config that ``load`` or ``replace_linears`` made the model's adapter from; None if there is none."""
    return model.mebp.lora if hasattr(model, "mebp") else getattr(model, "mebp_lora", None)


def read_adapter_config(directory: Path | str) -> LoraConfig:
    """Reads the ``LoraConfig`` of a saved adapter, and compares it with the header of the weights.

    Raises:
        ValueError: the config is damaged, contradicts the weights, or uses what only PEFT's own layers can do.
    """
    path, weights = Path(directory) / CONFIG, weights_of(Path(directory))
    if not path.exists():
        raise ValueError(f"{directory} is not an adapter: it has no {CONFIG}")
    values = read_json_object(path, "save the adapter again")
    try:
        config = lora_config_from_file(values)
    except strict_json.MALFORMED as error:
        raise ValueError(f"{path}: {error}") from None
    entries, metadata = safetensors_file.read_safetensors_header(weights)
    # A model with this adapter is made by the config alone, and a wrong rank could ask for any amount of memory.
    for name, (_, shape, _, _) in entries.items():
        layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if config.target_parameters and not config.targets(layer):
            continue  # of experts: ``check_fit`` compares them with the model's
        if name.endswith(".lora_A.weight") and shape[:1] != (config.rank(layer),):
            raise ValueError(
                f"the adapter {directory} contradicts itself: {layer} has rank {config.rank(layer)} by its config, and "
                f"{name} has shape {shape}"
            )
    largest = max((shape[0] for _, shape, _, _ in entries.values() if shape), default=0)
    if max((config.r, *config.rank_pattern.values())) > largest:
        raise ValueError(f"the adapter {directory} contradicts itself: its config has a rank that no tensor has")
    seal = seal_of(weights, metadata)
    if seal is not None and json.loads(json.dumps(scaling_settings(config))) != seal.get("scaling"):
        raise FileError(f"{path} is not what {weights} was saved with ({seal.get('scaling')!r:.200}): put it back")
    return config


def load_adapter(model: Any, directory: Path | str) -> None:
    """Puts a saved adapter's values into ``model``, whose adapter must have the same layers and ranks.

    ``mebp_triton.load(store, lora=read_adapter_config(directory))`` makes such a model, and so does ``replace_linears``
    with that config. Warns where the store was made of another base model than that of the adapter.

    Raises:
        ValueError: the adapter is damaged, or of another model or shape; the model keeps its own.
    """
    if hasattr(model, "mebp") and (reason := other_base(directory, model.mebp.store)):
        warnings.warn(reason, stacklevel=2)
    restore_adapter(model, directory)


def restore_adapter(model: Any, directory: Path | str) -> None:
    """Does what ``load_adapter`` does, without a warning."""
    config, tensors = read_adapter_config(directory), read_adapter_tensors(directory)
    stops = saved_stops(directory)
    copy_adapter(model, tensors, str(directory))
    for name, layer in adapter_layers(model).items():
        layer.scaling = config.scaling(name)
    if hasattr(model, "mebp"):
        add_stops(model, stops)
    # The model's config takes the scaling over, so that ``save_adapter`` writes the one that is used.
    holder, name = (model.mebp, "lora") if hasattr(model, "mebp") else (model, "mebp_lora")
    setattr(holder, name, replace(_config_of(model) or config, **scaling_settings(config)))


def adapter_shapes(
    config: LoraConfig, layers: Mapping[str, tuple[int, int]], experts: Iterable[FusedExperts] = ()
) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by PEFT's names.

    Args:
        layers: the (out, in) features of all linear layers by path.
        experts: those that lie in one tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in layers.items():
        if config.targets(name):
            shapes[f"{PREFIX}{name}.lora_A.weight"] = (config.rank(name), columns)
            shapes[f"{PREFIX}{name}.lora_B.weight"] = (rows, config.rank(name))
    for parameter, (path, one) in expert_adapters(config, experts).items():
        rows, columns = one.shapes[parameter.rpartition(".")[2]]
        ranks = one.count * config.rank(parameter)
        shapes |= {f"{PREFIX}{path}.lora_A.weight": (ranks, columns), f"{PREFIX}{path}.lora_B.weight": (rows, ranks)}
    return shapes


def check_fit(own: Mapping[str, tuple[int, ...]], tensors: dict[str, Tensor], what: str) -> None:
    """Raises ValueError where ``tensors`` have other names or shapes than ``own``, or are not finite."""
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or surplus:
        verb, names = ("lacks", missing) if missing else ("has", surplus)
        raise ValueError(f"the adapter {what} does not fit this model: it {verb} {enumerate_names(names, 1)}")
    for name, shape in own.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"the adapter {what} does not fit this model: {name} has shape {tuple(tensors[name].shape)}, "
                f"wanted {shape}"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"the adapter {what} is damaged: {name} has the dtype {tensors[name].dtype}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"the adapter {what} is damaged: {name} is not finite")


@torch.no_grad()
def copy_adapter(model: Any, tensors: dict[str, Tensor], what: str) -> None:
    """Copies all of ``tensors`` into the model's adapter, or none where one does not fit; see ``check_fit``."""
    own = adapter_tensors(model)
    check_fit({name: tuple(tensor.shape) for name, tensor in own.items()}, tensors, what)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
