"""Drop-in: the linear layers of a loaded model become int4, in place, one matrix at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.kernels.names import Scheme
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.layers.lora_config import LoraConfig, as_lora_config
from mebp_triton.models.build import check_targets
from mebp_triton.models.saving import install_saving
from mebp_triton.models.skeleton import contains_any

from .bitsandbytes_layers import check_linear4bit, is_linear4bit, take_linear4bit
from .int4_config import METHOD
from .model_layers import check_names, inner_model, linear_layers
from .peft_layer import adapted_layers, check_adapted_layer, fuse_lora_layers, register_where_installed
from .quantizer import settle


def replace_linears(
    model: Any,
    lora: LoraConfig | Any | None = None,
    *,
    exclude_modules: str | tuple[str, ...] | list[str] | None = None,
    scheme: Scheme = "symmetric",
    group_size: int = 64,
    scale_search: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    seed: int = 0,
) -> Any:
    """Makes the linear layers of ``model`` int4, in place, and returns it.

    ``nn.Linear`` and transformers' ``Conv1D`` are quantised; bitsandbytes' ``Linear4bit`` keeps its codes and scales,
    bit for bit; PEFT's LoRA layers over any of these keep their adapters, and stay PEFT's. Layers turn int4 in place,
    with their hooks; each matrix is freed before the next is read. A transformers model's head stays as it is, and so
    do modules that it needs in float32, routers, and what PEFT keeps trained copies of (``modules_to_save``).

    ``save_pretrained`` of a transformers model then writes int4 weights that ``from_pretrained`` reads as with
    ``Int4Config``; with ``lora``, the adapter alone.

    Without PEFT's layers nothing but the new adapters requires a gradient afterwards; with them, what did before.

    Args:
        model: a transformers or PEFT model, or any module. It must be whole: no weight on the meta device.
        lora: ours or a ``peft.LoraConfig``; the layers it targets become ``Int4LoRALinear``. None: no adapters, or
            those of PEFT that the model has.
        exclude_modules: modules that stay as they are with all they hold: paths, or whole parts of paths
            ("layers.0.mlp", "q_proj"); as ``Int4Config``'s ``modules_to_not_convert``.
        scheme, group_size, scale_search: for the layers that are quantised here; as in ``quantize``.
        adapter_dtype: float32 or bfloat16.
        backend: "auto", "triton" or "panel".
        seed: of the adapters' initial values.

    Raises:
        ValueError: a layer or an argument does not fit. The model has not been changed then, unless a weight that is
            quantised here turns out not to be finite.
    """
    config = None if lora is None else as_lora_config(lora)
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
    check_names("exclude_modules", excluded, model)
    has_peft = inner_model(model) is not model or bool(adapted_layers(model))
    layers: dict[str, Any] = {
        path: layer
        for path, layer in linear_layers(model).items()
        if not contains_any(path, excluded) and not (has_peft and layer.weight.requires_grad)
    }
    _check(model, layers, config, has_peft, scheme, group_size, adapter_dtype, backend)

    generator = torch.Generator().manual_seed(seed)
    for path, layer in layers.items():
        transposed = isinstance(layer, Conv1D)
        if type(layer) is not Int4Linear:
            _become(layer, _frozen(layer, path, (scheme, group_size, scale_search), backend))
        if config is not None and config.targets(path):
            _become(layer, _adapted(layer, path, config, adapter_dtype, generator, transposed))
    if has_peft:
        fuse_lora_layers(model)
    else:
        adapters = {"lora_A", "lora_B"}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config is not None and name.rpartition(".")[2] in adapters)
    settle(model)
    if config is not None:
        model.mebp_lora = config
        if isinstance(model, PreTrainedModel):
            install_saving(model)
    else:
        register_where_installed()
    return model


def _check(
    model: nn.Module,
    layers: dict[str, Any],
    config: LoraConfig | None,
    has_peft: bool,
    scheme: Scheme,
    group_size: int,
    adapter_dtype: torch.dtype,
    backend: str,
) -> None:
    """All that can be wrong, before anything is changed."""
    kind = type(model).__name__
    if not layers:
        raise ValueError(f"{kind} has no linear layer to replace (heads and excluded modules stay as they are)")
    if has_peft and config is not None:
        raise ValueError(f"{kind} has adapters of PEFT already: leave out lora, they are taken over")
    if config is not None and hasattr(model, "mebp"):
        raise ValueError(f"{kind} comes from load: give it the lora there, load(store, lora=...)")
    if adapter_dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"adapter_dtype must be float32 or bfloat16, got {adapter_dtype}")
    settings = getattr(getattr(inner_model(model), "hf_quantizer", None), "quantization_config", None)
    if settings is not None and settings.quant_method not in (METHOD, "bitsandbytes"):
        method = getattr(settings.quant_method, "value", settings.quant_method)
        raise ValueError(f"{kind} is quantised by {method} already: load it unquantised")
    quantize_matrix(torch.zeros(1, 1), scheme, group_size)
    for path, wrapper in adapted_layers(model).items():
        if wrapper.get_base_layer() in layers.values():
            check_adapted_layer(wrapper, path)
    for path, layer in layers.items():
        _check_layer(layer, path, backend)
    if config is not None:
        check_targets(config, list(layers), model)


def _check_layer(layer: Any, path: str, backend: str) -> None:
    if layer.weight.device.type == "meta":
        raise ValueError(f"{path} has no weight in memory (device meta): load the model without offloading")
    resolve_backend(backend, layer.weight.device)
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        raise ValueError(f"{path}: something stands in the place of its forward; name it in exclude_modules")
    if is_linear4bit(layer):
        check_linear4bit(layer, path)
    elif type(layer) is Int4LoRALinear:
        raise ValueError(f"{path} is int4 and has its adapter already: load the model anew, with the lora you want")
    elif type(layer) not in (nn.Linear, Conv1D, Int4Linear):
        raise ValueError(
            f"{path} is a {type(layer).__module__}.{type(layer).__name__}, which cannot be replaced; "
            "name it in exclude_modules"
        )
    elif layer._parameters.get("weight") is None:
        raise ValueError(f"{path}: its weight is computed from others; remove that, or name it in exclude_modules")
    elif type(layer) is not Int4Linear and layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{path}: weights of {layer.weight.dtype} cannot be quantised; convert the model first")


def _become(old: Any, new: nn.Module) -> None:
    """Turns ``old`` into ``new`` where it is, with the hooks that were put on it: forward, backward, accelerate's."""
    placing = vars(old).get("_hf_hook")
    if placing is not None:
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


def _frozen(layer: Any, path: str, options: tuple[Scheme, int, bool], backend: str) -> Int4Linear:
    if is_linear4bit(layer):
        weight, dtype = take_linear4bit(layer, path), layer.compute_dtype or torch.float32
    else:
        matrix, dtype = layer.weight.detach(), layer.weight.dtype
        try:
            weight = quantize_matrix(matrix.t() if isinstance(layer, Conv1D) else matrix, *options)[0]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    new = Int4Linear(weight, None, dtype, backend)
    new.register_parameter("bias", layer.bias)
    return new


def _adapted(
    frozen: Int4Linear,
    path: str,
    config: LoraConfig,
    adapter_dtype: torch.dtype,
    generator: torch.Generator,
    transposed: bool,
) -> Int4LoRALinear:
    layer = Int4LoRALinear(
        frozen.int4(),
        None,
        frozen.compute_dtype,
        rank=config.rank(path),
        scaling=config.scaling(path),
        dropout=config.lora_dropout,
        backend=frozen.backend,
        adapter_dtype=adapter_dtype,
        generator=generator,
    )
    layer.register_parameter("bias", frozen.bias)
    layer.fan_in_fan_out = transposed
    return layer
