"""Which layers of a transformers or PEFT model may be int4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.models.direct_reads import directly_read
from mebp_triton.models.skeleton import contains_any, kept_modules

from .bitsandbytes_layers import is_linear4bit
from .peft_layer import modules_of_peft


def linear_layers(model: Any, saved: bool = False) -> dict[str, nn.Module]:
    """The layers of ``model`` that may be int4, by path: the base model's linear layers, also those inside PEFT's.

    Heads stay float: they are the output embeddings, or lie outside of the base model. So do ``kept_modules``, what is
    ``directly_read``, and what PEFT owns. bitsandbytes' 4-bit layers are taken wherever they are, since they are
    quantised already.

    Args:
        model: a transformers or PEFT model, or any module.
        saved: whether the layers of a saved model are asked for, which names those that are float. It may have
            directly read ones in int4, as older models do.
    """
    whole = inner_model(model)
    base = set(whole.modules())
    if isinstance(whole, PreTrainedModel):
        head = whole.get_output_embeddings()
        base = set(whole.base_model.modules()) - set(() if head is None else head.modules())
    owned, kept = modules_of_peft(model), kept_modules(whole)
    # Layers inside PEFT's wrappers are read through these, which hand out the weight of the layer inside.
    reads = {part for path in (() if saved else directly_read(whole)) for part in whole.get_submodule(path).modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if path
        and isinstance(module, nn.Linear | Conv1D)
        and module not in owned
        and (is_linear4bit(module) or (module in base and not kept(path_without_peft(path)) and module not in reads))
    }


def inner_model(model: Any) -> Any:
    """The model inside a ``PeftModel``, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def path_without_peft(path: str) -> str:
    """The path that a layer had before PEFT wrapped it."""
    return path.replace(".base_layer", "")


def check_names(what: str, names: Iterable[str], model: nn.Module) -> None:
    """Raises ValueError where ``model`` has no module of one of ``names``, as with a mistyped one."""
    for name in names:
        if not any(contains_any(path, [name]) for path, _ in model.named_modules()):
            raise ValueError(f"{what}: {type(model).__name__} has no module {name!r}")


def base_prefix(model: Any) -> str:
    """The prefix of the base model's names. Saved names leave it out: a model may be loaded without its head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."
