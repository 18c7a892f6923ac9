"""Fine-tune 4-bit language models with LoRA by true gradients, inside a memory budget.

The names below are the public interface; they are imported on first use, so that ``import mebp_triton`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapter import load_adapter as load_adapter
    from .adapter import read_adapter_config as read_adapter_config
    from .adapter import save_adapter as save_adapter
    from .callback import SelectionCallback as SelectionCallback
    from .convert import quantize as quantize
    from .integrations.peft_layer import PeftInt4Linear as PeftInt4Linear
    from .integrations.peft_layer import register_peft as register_peft
    from .integrations.quantizer import Int4Config as Int4Config
    from .integrations.replace import replace_linears as replace_linears
    from .kernels.layout import Int4Weight as Int4Weight
    from .lora import Int4Linear as Int4Linear
    from .lora import Int4LoRALinear as Int4LoRALinear
    from .lora import LoraConfig as LoraConfig
    from .lora import int4_lora_linear as int4_lora_linear
    from .model import load as load
    from .optim import BlockAdamW as BlockAdamW
    from .selection import LayerCyclicManager as LayerCyclicManager

_HOMES = {
    "BlockAdamW": "optim",
    "Int4Config": "integrations.quantizer",
    "Int4Linear": "lora",
    "Int4LoRALinear": "lora",
    "Int4Weight": "kernels.layout",
    "LayerCyclicManager": "selection",
    "LoraConfig": "lora",
    "PeftInt4Linear": "integrations.peft_layer",
    "int4_lora_linear": "lora",
    "SelectionCallback": "callback",
    "load": "model",
    "load_adapter": "adapter",
    "quantize": "convert",
    "read_adapter_config": "adapter",
    "register_peft": "integrations.peft_layer",
    "replace_linears": "integrations.replace",
    "save_adapter": "adapter",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
