"""What Hugging Face's ``Trainer`` needs of a model with adapters of ours: to save them, and to take them up again.

``save_pretrained`` writes the adapter alone: in PEFT's files, and once more as ``model.safetensors``, by the names of
the model's own parameters, which is what ``Trainer`` looks for when it resumes or loads the best checkpoint.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mebp_triton.system import safetensors_file

from .adapter import adapter_layers, save_adapter

RESUMABLE = "model.safetensors"


def install_saving(model: Any) -> None:
    """Gives ``model`` a ``save_pretrained`` of its adapter, and a ``load_state_dict`` that takes what it wrote."""
    model.save_pretrained = functools.partial(save_pretrained, model)
    model.register_load_state_dict_post_hook(_only_the_adapter_is_missed)


def save_pretrained(
    model: Any, save_directory: Path | str, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
) -> None:
    """Writes the adapter of ``model``; other options of transformers are about base weights, and have no effect.

    Raises:
        ValueError: there is no adapter, or not only the adapter is trained, or the files are to be pushed.
    """
    if hasattr(model, "mebp") and model.mebp.lora is None:
        raise ValueError(
            f"the model has no adapter to save, and its weights lie in {model.mebp.store.directory} already: "
            f"load it with lora=LoraConfig(...)"
        )
    if push_to_hub:
        raise ValueError("push_to_hub is not supported: save, and upload the files")
    own = _adapter_parameters(model)
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in own]
    if others:
        raise ValueError(
            f"{others[0]} is trained as well, which an adapter's files have no place for: freeze it, or train it by "
            f"PEFT's modules_to_save"
        )
    if is_main_process:
        directory = Path(save_directory)
        save_adapter(model, directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
        safetensors_file.write_safetensors(directory / RESUMABLE, tensors, metadata={"format": "pt"})


def _adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in adapter_layers(model).items()
        for name in ("lora_A", "lora_B")
    }


def _only_the_adapter_is_missed(model: nn.Module, keys: Any) -> None:
    """The base weights are in place already."""
    own = _adapter_parameters(model)
    keys.missing_keys[:] = [key for key in keys.missing_keys if key in own]
