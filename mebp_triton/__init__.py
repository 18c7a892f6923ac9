"""Fine-tune 4-bit language models with LoRA by true gradients, inside a memory budget.

The names below are the public interface. Each is imported on first use, so that ``import mebp_triton`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .blocks.selection import LayerCyclicManager as LayerCyclicManager
    from .convert.quantize import quantize as quantize
    from .huggingface.peft_layer import PeftInt4Linear as PeftInt4Linear
    from .huggingface.peft_layer import register_peft as register_peft
    from .huggingface.quantizer import Int4Config as Int4Config
    from .huggingface.replace import replace_linears as replace_linears
    from .huggingface.selection_callback import SelectionCallback as SelectionCallback
    from .kernels.layout import Int4Weight as Int4Weight
    from .layers.linear import Int4Linear as Int4Linear
    from .layers.linear import Int4LoRALinear as Int4LoRALinear
    from .layers.lora_config import LoraConfig as LoraConfig
    from .layers.lora_function import int4_lora_linear as int4_lora_linear
    from .models.adapter import load_adapter as load_adapter
    from .models.adapter import read_adapter_config as read_adapter_config
    from .models.adapter import save_adapter as save_adapter
    from .models.load import load as load
    from .training.optimizers.adamw import BlockAdamW as BlockAdamW

_HOMES = {
    "BlockAdamW": "training.optimizers.adamw",
    "Int4Config": "huggingface.quantizer",  # which registers the method as well
    "Int4Linear": "layers.linear",
    "Int4LoRALinear": "layers.linear",
    "Int4Weight": "kernels.layout",
    "LayerCyclicManager": "blocks.selection",
    "LoraConfig": "layers.lora_config",
    "PeftInt4Linear": "huggingface.peft_layer",
    "int4_lora_linear": "layers.lora_function",
    "SelectionCallback": "huggingface.selection_callback",
    "load": "models.load",
    "load_adapter": "models.adapter",
    "quantize": "convert.quantize",
    "read_adapter_config": "models.adapter",
    "register_peft": "huggingface.peft_layer",
    "replace_linears": "huggingface.replace",
    "save_adapter": "models.adapter",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
