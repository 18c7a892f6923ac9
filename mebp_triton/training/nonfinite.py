"""Finds the parameter, the module's output or the gradient from which a number that is not finite came."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def _named(model: Any, name: str) -> str:
    """Adds the number of its block to the ``name`` of a module or parameter."""
    for index, block in enumerate(model.mebp.engine.blocks):
        prefix = next(path for path, module in model.named_modules() if module is block)
        if name == prefix or name.startswith(f"{prefix}."):
            return f"{name} (block {index})"
    return name


def _finite(tensors: Iterable[Any]) -> bool:
    floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in floats)


def broken_parameter(model: Any) -> str | None:
    """Returns the name of the first trainable parameter that is not finite, or None."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _finite([parameter]):
            return _named(model, name)
    return None


def broken_gradient(model: Any) -> str | None:
    """Returns the name of the parameter whose gradient is not finite, or None.

    Of several it is the nearest to the loss, from which the others got theirs.
    """
    for name, parameter in reversed(list(model.named_parameters())):
        if not _finite([parameter.grad]):
            return _named(model, name)
    return None


@torch.no_grad()
def broken_output(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> str | None:
    """Runs forward passes, and returns the name of the first module whose output is not finite, or None."""
    broken: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not broken and not _finite(tree_leaves(output)):
            broken.append(name)

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(functools.partial(look, name)) for name, module in named]
    try:
        for batch in batches:
            model(**batch, use_cache=False)
            if broken:
                return _named(model, broken[0])
    finally:
        for handle in handles:
            handle.remove()
    return None
