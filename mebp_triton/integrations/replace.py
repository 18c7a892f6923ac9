"""Drop-in: the linear layers of a loaded model become int4, in place, one matrix at a time."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.kernels.layout import Scheme
from mebp_triton.kernels.ops import resolve_backend
from mebp_triton.lora import Int4Linear, Int4LoRALinear, LoraConfig, as_lora_config
from mebp_triton.model import check_targets
from mebp_triton.quantization import quantize_matrix

from .bitsandbytes_layers import check_linear4bit, is_linear4bit, take_linear4bit
from .peft_layer import check_lora_layer, is_lora_layer, register_peft, take_lora_layer


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
    bit for bit; PEFT's LoRA layers over any of these keep their adapters, and stay PEFT's. Each matrix is freed before
    the next is read. A transformers model's head stays as it is, and so do modules that it needs in float32.

    Without PEFT's layers nothing but the new adapters requires a gradient afterwards; with them, what did before.

    Args:
        model: a transformers or PEFT model, or any module. It must be whole: no weight on the meta device.
        lora: ours or a ``peft.LoraConfig``; the layers it targets become ``Int4LoRALinear``. None: no adapters, or
            those of PEFT that the model has.
        exclude_modules: layers that stay as they are; as in ``LoraConfig``.
        scheme, group_size, scale_search: for the layers that are quantised here; as in ``quantize``.
        adapter_dtype: float32 or bfloat16.
        backend: "auto", "triton" or "panel".
        seed: of the adapters' initial values.

    Raises:
        ValueError: a layer or an argument does not fit. The model has not been changed then, unless a weight that is
            quantised here turns out not to be finite.
    """
    config = None if lora is None else as_lora_config(lora)
    sites = _sites(model, exclude_modules)
    modules = {path: model.get_submodule(path) for (path, *_) in sites}
    has_peft = _has_peft(model)
    _check(model, modules, config, has_peft, scheme, group_size, adapter_dtype, backend)
    del modules

    options = (scheme, group_size, scale_search)
    generator = torch.Generator().manual_seed(seed)
    for path, *aliases in sites:
        old = model.get_submodule(path)
        layer = old.base_layer if is_lora_layer(old) else old
        new = layer if type(layer) is Int4Linear else _frozen(layer, path, options, backend)
        if is_lora_layer(old):
            take_lora_layer(old, new)
            continue
        if config is not None and config.targets(path):
            new = _adapted(new, path, config, adapter_dtype, generator, isinstance(old, Conv1D))
        for alias in (path, *aliases):
            parent, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new.train(old.training))
    if not has_peft:
        adapters = {"lora_A", "lora_B"}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config is not None and name.rpartition(".")[2] in adapters)
        if config is not None:
            model.mebp_lora = config
        elif importlib.util.find_spec("peft") is not None:
            register_peft()
    if not any(is_linear4bit(module) for module in model.modules()):
        _forget_bitsandbytes(_inner(model))
    return model


def _inner(model: Any) -> Any:
    """The model that PEFT was put around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_peft(model: Any) -> bool:
    return _inner(model) is not model or any(is_lora_layer(module) for module in model.modules())


def _sites(model: nn.Module, exclude: Any) -> list[list[str]]:
    """The paths of each layer to look at; a layer that serves in several places has several."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    excluded = LoraConfig(exclude_modules=exclude)
    kept = _kept_modules(model)
    inside = [paths[module][0] + "." for module in paths if is_lora_layer(module)]
    found = []
    for module, names in paths.items():
        within = any(names[0].startswith(prefix) for prefix in inside)
        layer = module.base_layer if is_lora_layer(module) else module
        linear = isinstance(layer, nn.Linear | Conv1D) and (is_linear4bit(layer) or module not in kept)
        if linear and not within and names != [""] and excluded.targets(names[0]):
            found.append(names)
    return found


def _kept_modules(model: Any) -> set[nn.Module]:
    """What stays float: heads, which lie outside of a transformers model's base; what it wants in float32; and what
    PEFT trains whole."""
    inner = _inner(model)
    kept: set[nn.Module] = set()
    if isinstance(inner, PreTrainedModel):
        base = set(inner.base_model.modules())
        kept |= {module for module in inner.modules() if module not in base}
        head = inner.get_output_embeddings()
        kept |= set() if head is None else set(head.modules())
        wanted = set(getattr(inner, "_keep_in_fp32_modules", None) or ())
        kept |= {module for name, module in inner.named_modules() if wanted & set(name.split("."))}
    if _has_peft(model):
        kept |= {m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    return kept


def _check(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: LoraConfig | None,
    has_peft: bool,
    scheme: Scheme,
    group_size: int,
    adapter_dtype: torch.dtype,
    backend: str,
) -> None:
    """All that can be wrong, before anything is changed."""
    kind = type(model).__name__
    if not modules:
        raise ValueError(f"{kind} has no linear layer to replace (heads and excluded modules stay as they are)")
    if has_peft and config is not None:
        raise ValueError(f"{kind} has adapters of PEFT already: leave out lora, they are taken over")
    if adapter_dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"adapter_dtype must be float32 or bfloat16, got {adapter_dtype}")
    quantize_matrix(torch.zeros(1, 1), scheme, group_size)
    for path, module in modules.items():
        if is_lora_layer(module):
            check_lora_layer(module, path)
        layer: Any = module.base_layer if is_lora_layer(module) else module
        if layer.weight.device.type == "meta":
            raise ValueError(f"{path} has no weight in memory (device meta): load the model without offloading")
        resolve_backend(backend, layer.weight.device)
        if is_linear4bit(layer):
            check_linear4bit(layer, path)
        elif type(layer) is Int4LoRALinear or config is not None and hasattr(model, "mebp"):
            raise ValueError(f"{path} is int4 and has its adapter already: load the model anew, with the lora you want")
        elif type(layer) not in (nn.Linear, Conv1D, Int4Linear):
            raise ValueError(
                f"{path} is a {type(layer).__module__}.{type(layer).__name__}, which cannot be replaced; "
                "name it in exclude_modules"
            )
        elif type(layer) is not Int4Linear and layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{path}: weights of {layer.weight.dtype} cannot be quantised; convert the model first")
    if config is not None:
        check_targets(config, list(modules), kind)


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
    return new.train(layer.training)


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


def _forget_bitsandbytes(model: Any) -> None:
    """Nothing of it is left: trainers, PEFT and ``save_pretrained`` should not take the model for one of its."""
    for name in ("hf_quantizer", "is_loaded_in_4bit", "is_4bit_serializable", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    if isinstance(model, PreTrainedModel):
        for name in ("quantization_config", "_is_quantized", "_pre_quantization_dtype"):
            vars(model.config).pop(name, None)
