"""The adapter of ``--adapter``: the settings and the checksum that a run starts from, and whether it fits the store."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mebp_triton.cli.console import say
from mebp_triton.layers.lora_config import ALL_AND_EXPERTS, ALL_LINEAR, LoraConfig
from mebp_triton.models.adapter import read_adapter_config
from mebp_triton.models.adapter_directory import CONFIG
from mebp_triton.models.adapter_seal import base_of_adapter, other_base, read_adapter_tensors
from mebp_triton.models.config import read_json_object
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, safetensors_file, strict_json
from mebp_triton.training.checkpoint import STATE, store_fingerprint
from mebp_triton.training.run_directory import run_of

# The settings that an adapter brings with it. Only dropout may be another one, since no tensor depends on it.
FROM_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
)


def fill_in(given: dict[str, Any]) -> dict[str, Any]:
    """Adds to settings that name an adapter what the adapter says of its shape.

    Raises:
        ValueError: the adapter cannot be used, or one of the settings contradicts it.
    """
    shape = _settings_of(read_adapter_config(given["adapter"]))
    return given | _without_contradiction(given, shape, f"adapter {given['adapter']}")


def fill_in_from_run(given: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Does the same for a run that is resumed and began from an adapter, which need not be there any more.

    Raises:
        ValueError: the settings contradict the run's, or name another adapter.
    """
    state_file = atomic.locate_directory(checkpoint) / STATE
    if not state_file.exists():
        return fill_in(given) if given.get("adapter") else given
    state = strict_json.read_sealed(state_file)
    start, config = state.get("start"), state.get("config")
    if start is None:
        if given.get("adapter"):
            raise ValueError("cannot resume: the run did not start from an adapter; leave --adapter out")
        return given
    if not (isinstance(start, dict) and isinstance(config, dict)):
        raise ValueError(f"{state_file} is malformed, or of another version")
    adapter = given.get("adapter")
    if adapter and Path(adapter).exists() and start_record(adapter)["crc32"] != start.get("crc32"):
        raise ValueError(
            f"cannot resume: the run started from {start.get('adapter')}, and {adapter} has other weights "
            "than that had; leave --adapter out to go on from the run's checkpoint"
        )
    shape = {name: config[name] for name in FROM_ADAPTER if name in config}
    return given | {"adapter": start.get("adapter")} | _without_contradiction(given, shape, "adapter of the run")


def start_record(adapter: str) -> dict[str, Any]:
    """Returns the adapter's record for ``run.json`` and checkpoints: its place, its tensors' CRC-32, its base model."""
    crc32 = safetensors_file.tensors_checksum(read_adapter_tensors(adapter))
    return {"adapter": adapter, "crc32": crc32, "base_model_name_or_path": _base_of(adapter)}


def _base_of(adapter: str) -> Any:
    return read_json_object(Path(adapter) / CONFIG, "save the adapter again").get("base_model_name_or_path")


def doubt(adapter: str, store: Store) -> str | None:
    """Says why the adapter may be another model's, though its layers fit; None if nothing speaks for that."""
    run = run_of(Path(adapter))
    if run is not None and (run.checkpoint / STATE).exists():
        trained_on = strict_json.read_sealed(run.checkpoint / STATE).get("fingerprints", {})
        if trained_on.get("model") == store_fingerprint(store):
            return None
        other = "was trained on other weights than this store's: of another model, or quantized in another way"
        return f"the adapter {adapter} {other}"
    if reason := other_base(adapter, store):
        return reason
    sealed = base_of_adapter(adapter)
    if store.base is not None and sealed is not None and None not in (sealed.crc32, store.base.crc32):
        return None  # the same weights, whatever their names are
    base = _base_of(adapter)
    known = [os.path.basename(os.path.abspath(store.directory)), *re.split(r"[\s,()]+", store.source)]
    if store.base is not None:
        known.append(os.path.basename(store.base.name_or_path))
    if not base:
        return None
    name = os.path.basename(str(base).rstrip("/")).lower()
    # A quantized copy of a model adds a word to its name.
    endings = [other.lower().removeprefix(name) for other in known if other.lower().startswith(name)]
    if any(re.fullmatch(r"([-_.](q\d|iq\d|f16|bf16|int4|4bit|nf4|bnb|gguf|store).*)?", ending) for ending in endings):
        return None
    return f"the adapter {adapter} names {base} as its base model, and the store was made of {store.source}"


def say_doubt(adapter: str | None, store: Store) -> None:
    """Says in a line where the adapter may be another model's; its answers and losses would be nonsense then."""
    if adapter is not None and (reason := doubt(adapter, store)):
        say(f"warning: {reason}")


def _settings_of(config: LoraConfig) -> dict[str, Any]:
    """The settings by which ``TrainConfig.lora`` makes a config that adapts the same layers in the same way."""
    return {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _as_text(config.target_modules),
        "exclude_modules": _as_text(config.exclude_modules) if config.exclude_modules else None,
        "target_parameters": ",".join(config.target_parameters) if config.target_parameters else None,
        "rank_pattern": json.dumps(config.rank_pattern) if config.rank_pattern else None,
        "alpha_pattern": json.dumps(config.alpha_pattern) if config.alpha_pattern else None,
    }


def _as_text(modules: str | Iterable[str]) -> str:
    """Modules as a flag has them. An expression that looks like a name stays an expression by its parentheses."""
    if isinstance(modules, str):
        is_keyword = modules in (ALL_LINEAR, ALL_AND_EXPERTS)
        return modules if is_keyword or not re.fullmatch(r"[\w.,\s]*", modules) else f"({modules})"
    names = list(modules)
    if all(re.fullmatch(r"[\w.]*\w[\w.]*", name) for name in names):
        return ",".join(names)
    return rf"(.*\.)?({'|'.join(map(re.escape, names))})"


def _without_contradiction(given: dict[str, Any], shape: dict[str, Any], what: str) -> dict[str, Any]:
    """``shape``, but with the dropout that was given. ValueError where another setting was given and differs."""
    for name, value in shape.items():
        if name in given and name != "lora_dropout" and _plain(given[name]) != _plain(value):
            raise ValueError(f"{name} {given[name]} contradicts the {what}, which has {value}: leave it out")
    return shape | ({"lora_dropout": given["lora_dropout"]} if "lora_dropout" in given else {})


def _plain(value: Any) -> Any:
    """The value without what makes no difference: the order of names, and the spaces in JSON."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        return json.loads(value)
    return sorted(name.strip() for name in value.split(","))
