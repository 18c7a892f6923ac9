"""Finds the repeated blocks of a Hugging Face model from its module tree."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The decoder stack: the shallowest ``ModuleList`` with as many entries as the config has hidden layers.

    Args:
        model: a transformers (or PEFT) model.
        path: the stack's path in the module tree, where the rule does not find it.

    Returns:
        The path and the list.

    Raises:
        ValueError: no list fits, or several do at the same depth.
    """
    if path is not None:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"blocks={path!r} is no module of {type(model).__name__}") from None
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise ValueError(f"blocks={path!r} is a {type(found).__name__}, wanted a ModuleList with entries")
        return path, found
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} blocks; name it with blocks='path.to.list'")
    depth = min(entry[0] for entry in lists)
    shallowest = [entry for entry in lists if entry[0] == depth]
    if len(shallowest) > 1:
        names = ", ".join(entry[1] for entry in shallowest)
        raise ValueError(f"{type(model).__name__} has several lists of {count} blocks ({names}); choose with blocks=")
    return shallowest[0][1], shallowest[0][2]
