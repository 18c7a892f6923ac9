"""Makes the linear layers of a loaded model int4, in place, one matrix at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.kernels.names import Form, Scheme, fill_form
from mebp_triton.kernels.quantize import check_form, quantize_matrix
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.layers.lora_config import LoraConfig, as_lora_config
from mebp_triton.models.build import check_adapter_dtype, with_adapter
from mebp_triton.models.plain_linear import is_plain_linear
from mebp_triton.models.saving import install_saving
from mebp_triton.models.skeleton import contains_any
from mebp_triton.models.targets import check_targets

from .bitsandbytes_layers import check_linear4bit, int4_from_linear4bit, is_linear4bit
from .int4_config import METHOD
from .model_layers import check_names, inner_model, linear_layers
from .peft_layer import check_wrapper, fuse_lora_layers, peft_wrappers, register_where_installed
from .quantizer import mark_as_int4

CLASSIFIERS = ("score", "classifier", "qa_outputs")  # heads that PEFT trains by itself, by their names in transformers


def replace_linears(
    model: Any,
    lora: LoraConfig | Any | None = None,
    *,
    exclude_modules: str | tuple[str, ...] | list[str] | None = None,
    scheme: Scheme | None = None,
    group_size: int | None = None,
    scale_search: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    seed: int = 0,
    bits: int = 4,
) -> Any:
    """Makes the linear layers of ``model`` int4, in place.

    ``nn.Linear``, what computes the same, and transformers' ``Conv1D`` are quantised; bitsandbytes' ``Linear4bit``
    keeps its codes and scales, bit for bit; PEFT's LoRA layers over any of these keep their adapters, and stay PEFT's.
    Hooks on a layer stay. Each matrix is freed before the next is read. The head of a transformers model stays as it
    is, and so do modules that it needs in float32, routers, and what PEFT keeps trained copies of
    (``modules_to_save``).

    ``save_pretrained`` of a transformers model then writes int4 weights that ``from_pretrained`` reads as with
    ``Int4Config``; with ``lora``, the adapter alone.

    Without layers of PEFT, only the new adapters require a gradient afterwards; with them, what did before.

    Args:
        model: a transformers or PEFT model, or any module. No weight may be on the meta device.
        lora: our ``LoraConfig`` or a ``peft.LoraConfig``; the layers it targets become ``Int4LoRALinear``. None for no
            adapters, or those of PEFT that the model has.
        exclude_modules: modules that stay as they are with all they hold: paths, or some parts of paths in a row
            ("layers.0.mlp", "q_proj"); as ``Int4Config``'s ``modules_to_not_convert``.
        scheme, group_size, scale_search, bits: how float layers are quantised; as in ``quantize``.
        adapter_dtype: float32 or bfloat16.
        backend: "auto", "triton" or "panel".
        seed: draws the adapters' initial values.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer or an argument does not fit. The model is unchanged then, unless a weight that is quantised
            here is not finite, which shows only on the way.
    """
    form = fill_form(scheme, group_size, bits)
    check_form(*form)
    config = None if lora is None else as_lora_config(lora)
    has_peft = inner_model(model) is not model or bool(peft_wrappers(model))
    layers = _layers_to_replace(model, exclude_modules, has_peft)
    _check(model, layers, config, has_peft, adapter_dtype, backend)

    generator = torch.Generator().manual_seed(seed)
    for path, layer in layers.items():
        transposed = isinstance(layer, Conv1D)
        if type(layer) is not Int4Linear:
            _become(layer, _frozen(layer, path, form, scale_search, backend))
        if config is not None and config.targets(path):
            _become(layer, with_adapter(layer, path, config, adapter_dtype, generator, transposed))
    if has_peft:
        fuse_lora_layers(model)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config is not None and name.endswith((".lora_A", ".lora_B")))
    mark_as_int4(model)
    if config is None:
        register_where_installed()
        return model
    _warn_of_frozen_heads(model)
    model.mebp_lora = config
    if isinstance(model, PreTrainedModel):
        install_saving(model)
    return model


def _warn_of_frozen_heads(model: nn.Module) -> None:
    """Warns of a classifier, which is random where the model was made of a language model: it stays as it is."""
    heads = [name for name, _ in model.named_children() if name in CLASSIFIERS]
    if heads:
        warnings.warn(
            f"{heads[0]} of {type(model).__name__} stays frozen, and files of adapters made by lora do not hold it: "
            "to train it, leave out lora, and use peft.get_peft_model with task_type='SEQ_CLS' (or 'TOKEN_CLS', "
            "'QUESTION_ANS')",
            stacklevel=3,
        )


def _layers_to_replace(model: Any, excluded: str | Iterable[str] | None, has_peft: bool) -> dict[str, Any]:
    """The layers that become int4, by path. ValueError where an excluded name is of no module, or none are left."""
    names = [excluded] if isinstance(excluded, str) else list(excluded or ())
    check_names("exclude_modules", names, model)
    layers = {
        path: layer
        for path, layer in linear_layers(model).items()
        # Weights that are trained beside PEFT's adapters stay as they are.
        if not contains_any(path, names) and not (has_peft and layer.weight.requires_grad)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to replace (heads and excluded modules stay as they are)"
        )
    return layers


def _check(
    model: nn.Module,
    layers: dict[str, Any],
    config: LoraConfig | None,
    has_peft: bool,
    adapter_dtype: torch.dtype,
    backend: str,
) -> None:
    """Finds all that can be wrong before anything is changed, except for weights that are not finite."""
    kind = type(model).__name__
    if has_peft and config is not None:
        raise ValueError(f"{kind} has adapters of PEFT already: leave out lora, they are taken over")
    if config is not None and hasattr(model, "mebp"):
        raise ValueError(f"{kind} comes from load: give it the lora there, load(store, lora=...)")
    check_adapter_dtype(adapter_dtype)
    settings = getattr(getattr(inner_model(model), "hf_quantizer", None), "quantization_config", None)
    if settings is not None and settings.quant_method not in (METHOD, "bitsandbytes"):
        method = getattr(settings.quant_method, "value", settings.quant_method)
        raise ValueError(f"{kind} is quantised by {method} already: load it unquantised")
    for path, wrapper in peft_wrappers(model).items():
        if wrapper.get_base_layer() in layers.values():
            check_wrapper(wrapper, path)
    for path, layer in layers.items():
        _check_layer(layer, path, backend)
    if config is not None:
        check_targets(config, list(layers), model)


def _check_layer(layer: Any, path: str, backend: str) -> None:
    """Raises ValueError where ``layer`` cannot become int4."""
    if layer.weight.device.type == "meta":
        raise ValueError(f"{path} has no weight in memory (device meta): load the model without offloading")
    resolve_backend(backend, layer.weight.device)
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        raise ValueError(f"{path}: something stands in the place of its forward; name it in exclude_modules")
    if is_linear4bit(layer):
        check_linear4bit(layer, path)
    elif type(layer) is Int4LoRALinear:
        raise ValueError(f"{path} is int4 and has its adapter already: load the model anew, with the lora you want")
    elif type(layer) is not Int4Linear and not is_plain_linear(layer):
        raise ValueError(
            f"{path} is a {type(layer).__module__}.{type(layer).__name__}, which cannot be replaced; "
            "name it in exclude_modules"
        )
    elif layer._parameters.get("weight") is None:
        raise ValueError(f"{path}: its weight is computed from others; remove that, or name it in exclude_modules")
    elif type(layer) is not Int4Linear and layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{path}: weights of {layer.weight.dtype} cannot be quantised; convert the model first")


def _become(old: Any, new: nn.Module) -> None:
    """Turns the module ``old`` into ``new`` where it is, with its hooks: forward, backward, accelerate's.

    Whoever holds ``old``, such as its parent, a wrapper of PEFT or an optimizer's group, then holds ``new``.
    """
    placing = vars(old).get("_hf_hook")
    if placing is not None:
        # accelerate puts its own forward on the module; it is taken off, and put on again over the new class's.
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(old)
    new.train(old.training)
    hooks = {name: value for name, value in vars(old).items() if "_hook" in name}
    vars(old).clear()
    old.__class__ = type(new)
    vars(old).update(vars(new) | hooks)
    if placing is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(old, placing)


def _frozen(layer: Any, path: str, form: Form, scale_search: bool, backend: str) -> Int4Linear:
    """The int4 layer that ``layer`` becomes, with the same bias parameter."""
    if is_linear4bit(layer):
        weight, dtype = int4_from_linear4bit(layer), layer.compute_dtype or torch.float32
    else:
        matrix, dtype = layer.weight.detach(), layer.weight.dtype
        try:
            matrix = matrix.t() if isinstance(layer, Conv1D) else matrix
            weight, _ = quantize_matrix(matrix, form.scheme, form.group_size, scale_search, bits=form.bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    new = Int4Linear(weight, None, dtype, backend)
    new.register_parameter("bias", layer.bias)
    return new
