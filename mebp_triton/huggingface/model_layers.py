"""Which layers of a transformers or PEFT model may be int4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.layers.linear import Int4Linear
from mebp_triton.models.skeleton import contains_any, kept_modules

from .bitsandbytes_layers import is_linear4bit
from .peft_layer import added_modules

PLAIN = (nn.Linear, Conv1D)


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The layers that may be int4, by path: the linear layers and Conv1Ds of the base model, under PEFT's layers too.

    Not the heads, which lie outside of the base model or are the output embeddings; nor what PEFT adds, or keeps a
    trained copy of; nor ``kept_modules``. bitsandbytes' 4-bit layers are taken wherever they are.
    """
    whole = inner_model(model)
    base = set(whole.modules())
    if isinstance(whole, PreTrainedModel):
        head = whole.get_output_embeddings()
        base = set(whole.base_model.modules()) - set(() if head is None else head.modules())
    added, kept = added_modules(model), kept_modules(whole)
    return {
        path: module
        for path, module in model.named_modules()
        if path
        and isinstance(module, nn.Linear | Conv1D)
        and module not in added
        and (is_linear4bit(module) or (module in base and not kept(plain_path(path))))
    }


def inner_model(model: Any) -> Any:
    """The model that PEFT was put around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_path(path: str) -> str:
    """The path of a layer before PEFT took it in."""
    return path.replace(".base_layer", "")


def check_names(what: str, names: Iterable[str], model: nn.Module) -> None:
    """ValueError where one of ``names`` is of no module: a typo would do nothing."""
    for name in names:
        if not any(contains_any(path, [name]) for path, _ in model.named_modules()):
            raise ValueError(f"{what}: {type(model).__name__} has no module {name!r}")


def base_prefix(model: Any) -> str:
    """Names in a config leave it out: a model may be loaded with its head or without."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def ignore_in_ddp(model: Any) -> None:
    """DistributedDataParallel would send frozen scales at every step. Under all names that PEFT may give them."""
    names = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    for path, module in model.named_modules():
        if isinstance(module, Int4Linear):
            for prefix in ("", "base_model.", "base_model.model."):
                for place in (plain_path(path), f"{plain_path(path)}.base_layer"):
                    names |= {f"{prefix}{place}.{name}" for name in ("weight", "scales", "minimum", "codebook")}
    model._ddp_params_and_buffers_to_ignore = names
