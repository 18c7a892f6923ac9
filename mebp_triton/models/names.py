"""The names of a model's tensors, and whether a checkpoint has all of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from transformers import PreTrainedModel

# Ends of the names of buffers that old checkpoints hold and models compute.
DERIVED = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


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


def _first(names: list[str]) -> str:
    """Three of them, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_complete(where: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    have = set(found)
    missing = [name for name in wanted if name not in have]
    if missing:
        named = _first(missing)
        raise ValueError(f"{where} lacks {named}: give a complete checkpoint of the model its config describes")


def tell_unused(where: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Warns of tensors that ``model`` has no place for, but for those that checkpoints of its kind have as well."""
    beside = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = sorted(name for name in unused if not name.endswith(DERIVED) and not name.startswith("rope_"))
    left = [name for name in left if not any(re.search(pattern, name) for pattern in beside)]
    if left:
        warnings.warn(f"{where}: the model that its config describes has no {_first(left)}: left out", stacklevel=3)


def check_shape(where: str, name: str, got: Iterable[int], wanted: Iterable[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"{where}: {name} has shape {tuple(got)}, the model wants {tuple(wanted)}: "
            f"the weights and the config do not belong together"
        )


def current_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """What this version of transformers calls the tensors that checkpoints know by older names (5.x has a table)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return {key: key for key in keys}
    names = {key: key for key in keys}
    for rename in get_model_conversion_mapping(model):
        if isinstance(rename, WeightRenaming):
            names = {key: rename.rename_source_key(name)[0] for key, name in names.items()}
    return names
