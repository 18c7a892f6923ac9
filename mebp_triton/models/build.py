"""Fills a model without weights from a store."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mebp_triton.layers.head import Int4Head
from mebp_triton.layers.int4_module import Int4Module, replace_embedding
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.store.reader import Store

from .skeleton import Int4Site, float32_tensors, int4_sites


def check_matrices(store: Store, sites: list[Int4Site], tied: bool) -> None:
    """ValueError where the store does not hold the matrices of the model that its config describes."""
    if tied != store.tied_head:
        raise ValueError(f"store {store.directory}: config and manifest disagree on whether the head is tied")
    missing = [site.name for site in sites if site.name not in store.matrices]
    if missing:
        raise ValueError(f"store {store.directory} has no weights for {', '.join(missing[:3])}")
    surplus = sorted(store.matrices.keys() - {site.name for site in sites})
    if surplus:
        raise ValueError(f"store {store.directory}: its config has no place for {surplus[0]} of its weights")
    for site in sites:
        found, wanted = store.matrices[site.name].shape, (site.out_features, site.in_features)
        if found != wanted:
            raise ValueError(f"store {store.directory}: {site.name} is {found}, the config says {wanted}")


def check_targets(config: LoraConfig, adapted: list[str], model: str) -> None:
    """ValueError where the targets, or one of several, select nothing: a typo would lose a layer."""
    targets = config.target_modules
    entries = [targets] if isinstance(targets, str) else [[entry] for entry in targets]
    for entry in entries:
        if not any(dataclasses.replace(config, target_modules=entry).targets(name) for name in adapted):
            named = entry if isinstance(entry, str) else entry[0]
            raise ValueError(f"target_modules {named!r} matches no linear layer (but the head) of {model}")


class Builder:
    """Fills a skeleton from a store."""

    def __init__(
        self,
        store: Store,
        model: Any,
        lora: LoraConfig | None,
        device: torch.device,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        backend: str,
        seed: int,
    ) -> None:
        self.store, self.model, self.lora, self.device = store, model, lora, device
        self.dtype, self.adapter_dtype, self.backend = dtype, adapter_dtype, backend
        self.in_float32 = float32_tensors(model, dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.adapted: list[str] = []

    def replace_modules(self) -> tuple[dict[str, Int4Module], Int4Head]:
        """The int4 modules by name, and the head (among them only if it is not tied)."""
        sites, tied = int4_sites(self.model)
        check_matrices(self.store, sites, tied)
        head_name = next(name for name, m in self.model.named_modules() if m is self.model.get_output_embeddings())
        replaced: dict[str, Int4Module] = {}
        for site in sites:
            weight, old = self.store.weight(site.name), self.model.get_submodule(site.name)
            if site.role == "embedding":
                replace_embedding(old, weight, self.dtype, self.backend)
                replaced[site.name] = old
            elif site.role == "linear":
                replaced[site.name] = self.swap(site.name, self._linear(site.name, old))
        embedding = replaced[next(site.name for site in sites if site.role == "embedding")]
        weight = embedding.int4() if tied else self.store.weight(head_name)
        old = self.model.get_submodule(head_name)
        head = Int4Head(weight, self._float(f"{head_name}.bias", old.bias), self.dtype, self.backend)
        self.swap(head_name, head)
        if not tied:
            replaced[head_name] = head
        return replaced, head

    def _linear(self, name: str, old: nn.Linear | Conv1D) -> Int4Linear:
        weight, bias = self.store.weight(name), self._float(f"{name}.bias", old.bias)
        if self.lora is None or not self.lora.targets(name):
            return Int4Linear(weight, bias, self.dtype, self.backend)
        self.adapted.append(name)
        layer = Int4LoRALinear(
            weight,
            bias,
            self.dtype,
            rank=self.lora.rank(name),
            scaling=self.lora.scaling(name),
            dropout=self.lora.lora_dropout,
            backend=self.backend,
            device=self.device,
            adapter_dtype=self.adapter_dtype,
            generator=self.generator,
        )
        layer.fan_in_fan_out = isinstance(old, Conv1D)
        return layer

    def swap(self, name: str, module: Any) -> Any:
        parent, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, module.eval())
        return module

    def _float(self, name: str, expected: Tensor | None) -> Tensor | None:
        if expected is None:
            return None
        if name not in self.store.floats:
            raise ValueError(f"store {self.store.directory} has no tensor {name}")
        value = self.store.float_tensor(name)
        if value.shape != expected.shape:
            raise ValueError(
                f"store {self.store.directory}: {name} has shape {tuple(value.shape)}, "
                f"the config says {tuple(expected.shape)}"
            )
        return value.to(self.device, self._dtype(name, self.dtype))

    def _dtype(self, name: str, usual: torch.dtype) -> torch.dtype:
        return torch.float32 if self.in_float32(name) else usual

    def place_floats(self) -> None:
        """Parameters that stay float, and the buffers."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if parameter.device.type == "meta":
                parent, _, attribute = name.rpartition(".")
                value = self._float(name, parameter)
                assert value is not None
                self.model.get_submodule(parent)._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        for name, buffer in list(self.model.named_buffers()):
            parent, _, attribute = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            if isinstance(owner, Int4Module) and attribute in owner.INT4_BUFFERS:
                continue
            if name in self.store.floats:
                buffer = self.store.float_tensor(name).to(self._dtype(name, buffer.dtype))
            owner._buffers[attribute] = buffer.to(self.device)
