"""The names of a model's tensors, and whether a checkpoint has all of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable

from transformers import PreTrainedModel

# Ends of the names of buffers that old checkpoints hold and models compute.
DERIVED = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


def parameter_aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every parameter's name, with all names it goes by: a tied table may be stored under any of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in groups.values()}


def names_in(model: PreTrainedModel, stored: Container[str]) -> dict[str, str]:
    """For each name of a parameter, the one of its names that is in ``stored``. A parameter without one is left out."""
    found: dict[str, str] = {}
    for names in parameter_aliases(model).values():
        known = next((name for name in names if name in stored), None)
        if known is not None:
            found |= dict.fromkeys(names, known)
    return found


def persistent_buffers(model: PreTrainedModel) -> list[str]:
    """The names of the buffers that checkpoints carry."""
    kept = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in kept]


def tensor_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, tied ones under each of their names, and of persistent buffers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def enumerate_names(names: list[str], shown: int = 3) -> str:
    """The first names in a row, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_complete(where: str, wanted: Iterable[str], present: Iterable[str]) -> None:
    """Raises ValueError where one of ``wanted`` is not ``present``."""
    have = set(present)
    missing = [name for name in wanted if name not in have]
    if missing:
        raise ValueError(
            f"{where} lacks {enumerate_names(missing)}: give a complete checkpoint of the model its config describes"
        )


def warn_unused(where: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Warns of tensors that ``model`` has no place for, apart from those that every checkpoint of its kind has."""
    expected = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = sorted(name for name in unused if not name.endswith(DERIVED))
    left = [name for name in left if not any(re.search(pattern, name) for pattern in expected)]
    if left:
        names = enumerate_names(left)
        warnings.warn(f"{where}: the model that its config describes has no {names}: left out", stacklevel=3)


def check_shape(where: str, name: str, got: Iterable[int], wanted: Iterable[int]) -> None:
    """Raises ValueError where the tensor ``name`` does not have the shape that the model wants."""
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"{where}: {name} has shape {tuple(got)}, the model wants {tuple(wanted)}: "
            f"the weights and the config do not belong together"
        )


def current_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The name that this version of transformers gives each of ``keys``, which may be a checkpoint's older names.

    transformers 5 has a table of renamed tensors; 4.57 has none.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return {key: key for key in keys}
    names = {key: key for key in keys}
    for rename in get_model_conversion_mapping(model):
        if isinstance(rename, WeightRenaming):
            names = {key: rename.rename_source_key(name)[0] for key, name in names.items()}
    # A pattern may take a name of today for an older one, as the final norm of DeepSeek-V4.
    known = model.state_dict().keys()
    return {key: key if key in known and name not in known else name for key, name in names.items()}
