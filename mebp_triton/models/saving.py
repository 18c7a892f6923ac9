"""Lets Hugging Face's trainers save a model's adapter, load it again, and share the model between processes.

``save_pretrained`` writes the adapter alone: in PEFT's files, and once more as ``model.safetensors`` by the names of
the model's own parameters. ``Trainer`` looks for that file when it resumes or loads the best checkpoint.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mebp_triton.system import safetensors_file

from .adapter import adapter_layers, save_adapter

RESUMABLE = "model.safetensors"


def install_saving(model: Any) -> None:
    """Gives ``model`` a ``save_pretrained`` that writes its adapter, and a ``load_state_dict`` that reads it."""
    model.save_pretrained = functools.partial(save_pretrained, model)
    model.register_load_state_dict_post_hook(_ignore_missing_base_weights)


def save_pretrained(
    model: Any, save_directory: Path | str, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
) -> None:
    """Writes the adapter of ``model``. Other options of transformers concern base weights, and have no effect.

    Raises:
        ValueError: there is no adapter, more than the adapter is trained, or the files are to be pushed.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # ``model.add_adapter``: transformers saves its own adapters
        options |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub}
        return type(model).save_pretrained(model, save_directory, **options)
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
    """The adapter's tensors by the names of the model's own parameters."""
    return {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in adapter_layers(model).items()
        for name in ("lora_A", "lora_B")
    }


def _ignore_missing_base_weights(model: nn.Module, keys: Any) -> None:
    """Takes the base weights off the missing keys of a ``load_state_dict``: they are in place already."""
    own = _adapter_parameters(model)
    keys.missing_keys[:] = [key for key in keys.missing_keys if key in own]


def ignore_in_ddp(model: Any, kinds: type[nn.Module] = nn.Module) -> None:
    """Has DistributedDataParallel leave alone the frozen tensors of those modules of ``model`` that are of ``kinds``.

    It would send them to every process, buffers at every step, and write them in place: into mapped files, say.
    """
    named = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    if not isinstance(named, FrozenNames):
        model._ddp_params_and_buffers_to_ignore = FrozenNames(model, kinds, named)


# A model's names begin so inside of PEFT, which hands out the model's attributes: they must hold there as well.
PEFT_PREFIXES = ("", "base_model.", "base_model.model.")


class FrozenNames:
    """The names of the tensors in modules of ``kinds`` that are not trained, and ``others``.

    They are found anew whenever they are iterated: PEFT may have frozen, unfrozen or wrapped modules since. What is
    pickled, or copied without its model, are the names of this moment.
    """

    def __init__(self, model: nn.Module, kinds: type[nn.Module], others: Iterable[str]) -> None:
        # Weak, since the model holds this object: a model that nobody needs is freed at once, and not by a collection.
        self.model, self.kinds, self.others = weakref.ref(model), kinds, list(others)

    def __reduce__(self) -> Any:
        return frozenset, (list(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.model()))
        return frozenset(self) if copied is None else FrozenNames(copied, self.kinds, self.others)

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        model = self.model()
        if model is None:
            return
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, self.kinds):
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None and not tensor.requires_grad:
                        yield from (f"{prefix}{path}.{name}" if path else f"{prefix}{name}" for prefix in PEFT_PREFIXES)
