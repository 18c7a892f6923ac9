"""Writes an adapter in PEFT's format as vLLM and SGLang take it: one rank, one scaling, and the names of modules.

Both read rank and scaling from the config alone: vLLM ignores patterns, and SGLang admits an adapter by that rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mebp_triton.convert.readers.merged_store import Delta
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import PREFIX
from mebp_triton.models.adapter_directory import CONFIG
from mebp_triton.models.adapter_seal import write_weights
from mebp_triton.store.manifest import BaseModel
from mebp_triton.system import strict_json

# What vLLM's --max-lora-rank may be.
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_served_adapter(
    directory: Path,
    values: Mapping[str, Any],
    deltas: Mapping[str, Delta],
    layers: Iterable[str] | None,
    base: BaseModel,
) -> tuple[int, bool]:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Where ranks or scalings differ between modules, all get the largest rank, by rows and columns of zeros, and one
    scaling, by a factor in B.

    Args:
        directory: where they are written.
        values: what the adapter's own ``adapter_config.json`` has.
        deltas: what the adapter adds, by the paths of the modules.
        layers: the paths of all linear layers of the server's model; None where they are not known.
        base: the model that the server runs.

    Returns:
        The rank, and whether ranks or scalings were made equal.

    Raises:
        ValueError: the rank is larger than any that vLLM allows.
    """
    ranks = {delta.a.shape[0] for delta in deltas.values()}
    rank = max(ranks)
    if rank > MAX_RANKS[-1]:
        raise ValueError(f"the adapter has rank {rank}, and vLLM serves {MAX_RANKS[-1]} at most: train a smaller one")
    scalings = Counter(delta.scaling for delta in deltas.values())
    differ = len(ranks) > 1 or len(scalings) > 1
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": _whole(values["lora_alpha"]),
        "use_rslora": bool(values.get("use_rslora")),
    }
    scaling = scalings.most_common(1)[0][0] or 1.0
    stated = settings["lora_alpha"] / (math.sqrt(rank) if settings["use_rslora"] else rank)
    if differ or not math.isclose(stated, scaling, rel_tol=1e-6):  # patterns may give all modules one value too
        settings |= {"lora_alpha": _whole(scaling * rank), "use_rslora": False}
    tensors: dict[str, Tensor] = {}
    for path, (a, b, own) in deltas.items():
        more = rank - a.shape[0]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = nn.functional.pad(
            b if own == scaling else b * (own / scaling), (0, more)
        )
    targets = _targets(deltas, layers)
    write_weights(directory, tensors, LoraConfig(target_modules=targets, **settings), base)
    config = dict(values) | settings | {"rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True}
    config |= {"target_modules": targets, "target_parameters": None, "exclude_modules": None}
    config |= {"base_model_name_or_path": base.name_or_path, "revision": base.revision}
    strict_json.write_json(directory / CONFIG, config)
    return rank, differ


def rank_limit(rank: int) -> int:
    """The least ``--max-lora-rank`` of vLLM under which an adapter of this rank is served."""
    return next(limit for limit in MAX_RANKS if limit >= rank)


def _whole(value: float) -> float:
    """A whole number as such: vLLM's config has one for ``lora_alpha``."""
    return int(value) if value == int(value) else value


def _targets(adapted: Iterable[str], layers: Iterable[str] | None) -> list[str]:
    """The last parts of the adapted layers' paths, or the whole paths where other layers end, or may end, so too."""
    paths = set(adapted)
    ends = {path.rpartition(".")[2] for path in paths}
    exact = layers is not None and all(path in paths for path in layers if path.rpartition(".")[2] in ends)
    return sorted(ends if exact else paths)
