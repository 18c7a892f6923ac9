"""Turns a transformers model without weights into the int4 model of a store.

``load`` gives it the store's bytes, the planner's tracer shapes alone; the steps are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mebp_triton.kernels.reference import decode
from mebp_triton.layers.experts import ExpertAdapter, Int4Experts, replace_experts
from mebp_triton.layers.head import Int4Head
from mebp_triton.layers.int4_module import Int4Module, replace_embedding
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.layers.loss import OnePassLoss, install_loss
from mebp_triton.store.experts import ExpertPlaces, StoredExperts
from mebp_triton.store.reader import Store

from .direct_reads import directly_read
from .discover import join_shared_inputs
from .experts import FusedExperts, fused_experts
from .names import enumerate_names, names_in, parameter_aliases
from .skeleton import Int4Site, float32_tensors, int4_sites

ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_matrices(store: Store, sites: list[Int4Site], tied: bool) -> None:
    """Raises ValueError where the store does not hold the matrices of the model that its config describes."""
    if tied != store.tied_head:
        raise ValueError(f"store {store.directory}: config and manifest disagree on whether the head is tied")
    missing = [site.name for site in sites if site.name not in store.matrices]
    if missing:
        raise ValueError(f"store {store.directory} has no weights for {', '.join(missing[:3])}")
    surplus = sorted(store.matrices.keys() - {site.name for site in sites})
    if surplus:
        raise ValueError(f"store {store.directory}: its config has no place for {surplus[0]} of its weights")
    for site in sites:
        shape, wanted = store.matrices[site.name].shape, (site.out_features, site.in_features)
        if shape != wanted:
            raise ValueError(f"store {store.directory}: {site.name} is {shape}, the config says {wanted}")


def check_adapter_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError where adapters cannot have this dtype. float64 is for tests."""
    if dtype not in ADAPTER_DTYPES:
        raise ValueError(f"adapter_dtype must be float32 or bfloat16, got {dtype}")


def with_adapter(
    frozen: Int4Linear,
    path: str,
    config: LoraConfig,
    dtype: torch.dtype,
    generator: torch.Generator,
    transposed: bool,
    device: torch.device | None = None,
) -> Int4LoRALinear:
    """Makes the layer at ``path`` with its adapter from the frozen layer, whose tensors it takes over.

    Args:
        frozen: the layer without an adapter.
        path: the layer's path in the model, which decides on rank and scaling.
        config: the adapter's settings.
        dtype: the adapter's dtype.
        generator: draws the initial values.
        transposed: whether the float layer kept its weight as ``[in, out]``.
        device: the adapter's device, where it is not the weight's.
    """
    layer = Int4LoRALinear(
        frozen.int4(),
        None,
        frozen.compute_dtype,
        rank=config.rank(path),
        scaling=config.scaling(path),
        dropout=config.lora_dropout,
        backend=frozen.backend,
        device=device,
        adapter_dtype=dtype,
        generator=generator,
    )
    layer.register_parameter("bias", frozen.bias)
    layer.fan_in_fan_out = transposed
    return layer


@dataclass(frozen=True)
class Numerics:
    """Settings of how a model computes.

    Attributes:
        device: the device of activations.
        dtype: their dtype.
        adapter_dtype: the dtype of LoRA parameters.
        backend: "auto", "triton" or "panel".
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    backend: str = "auto"


class Builder:
    """Puts int4 modules and float tensors of ``store`` into ``model``, a skeleton.

    Args:
        store: the weights; a stand-in with shapes alone will do.
        model: a model of ``build_skeleton``.
        lora: the adapters, as ``resolve_targets`` returns them; None for none.
        numerics: see there.
        seed: draws the initial values of the adapters.

    Attributes:
        modules: the int4 modules by name. A tied head is not among them: it has no weight of its own.
        experts: the modules with int4 experts, and the names of their matrices, by the module's name.
        head, head_name: the head, tied or not, and its name.

    Raises:
        ValueError: the store does not hold the weights of the model.
    """

    def __init__(self, store: Store, model: Any, lora: LoraConfig | None, numerics: Numerics, seed: int) -> None:
        self.store, self.model, self.lora, self.numerics = store, model, lora, numerics
        self.sites, self.tied = int4_sites(model, store)
        check_matrices(store, self.sites, self.tied)
        self.decoded = self._sites_to_decode() | self._second_tables()
        self.float_of = names_in(model, store.floats)
        self.stays_float32 = float32_tensors(model, numerics.dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.modules: dict[str, Int4Module] = {}
        self.experts: dict[str, ExpertPlaces] = {}
        self.head: Int4Head
        self.head_name = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())

    def fill(self, place: Callable[[dict[str, Int4Module]], None]) -> None:
        """Replaces the modules and puts the float tensors in place.

        ``place`` puts the weights of ``modules`` where they shall lie; until then they are views of the store's files.
        """
        self._replace_modules()
        self._place_floats()
        place(self.modules)
        if self.tied:
            # The embedding may lie elsewhere by now: on a device, or in a file whose rows are read one by one.
            table = self.model.get_input_embeddings()
            self.head.set_int4(table.int4())
            self.head.rows, self.head.device = table.rows, table.device

    def finish(self, config: Any, rows: int | None = None) -> OnePassLoss:
        """Joins adapted layers that read one input, and installs the loss that needs no logits.

        Args:
            config: the model's.
            rows: as in ``OnePassLoss``.
        """
        if self.lora is not None:
            join_shared_inputs(self.model, config)
        loss = install_loss(self.model, self.head)
        loss.rows = rows
        return loss

    def swap(self, name: str, module: Any) -> Any:
        """Puts ``module`` in the place of the model's module ``name``, and returns it."""
        parent, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, module.eval())
        return module

    def _sites_to_decode(self) -> dict[str, Int4Site]:
        """The layers that the store has in int4 although the modelling code reads their weight, by that parameter.

        Stores made before such layers were told apart have them. One that an adapter names stays as it was.
        """
        read = directly_read(self.model)
        sites = [site for site in self.sites if site.role == "linear" and site.name in read]
        sites = [site for site in sites if self.lora is None or not self.lora.targets(site.name)]
        if sites:
            warnings.warn(
                f"store {self.store.directory}: {len(sites)} matrices are decoded to float, since the modelling code "
                f"reads their weight itself ({enumerate_names([site.name for site in sites], 1)})",
                stacklevel=4,
            )
        return {f"{site.name}.weight": site for site in sites}

    def _second_tables(self) -> dict[str, Int4Site]:
        """The sites whose weight another module has as well, which is no site (ProphetNet), by that one's parameter."""
        sites = {site.parameter: site for site in self.sites if site.role != "expert"}
        groups = [names for names in parameter_aliases(self.model).values() if len(names) > 1]
        return {
            name: sites[first]
            for names in groups
            for first in [name for name in names if name in sites][:1]
            for name in names
            if name not in sites
        }

    def _replace_modules(self) -> None:
        dtype, backend = self.numerics.dtype, self.numerics.backend
        head = self.model.get_output_embeddings()
        self._replace_experts()
        for site in self.sites:
            if site.role == "expert":
                continue
            old = self.model.get_submodule(site.name)
            if site.role == "embedding":
                replace_embedding(old, self.store.weight(site.name), dtype, backend)
                self.modules[site.name] = embedding = old
            elif site.role == "linear" and f"{site.name}.weight" not in self.decoded:
                self.modules[site.name] = self.swap(site.name, self._linear(site.name, old))
        weight = embedding.int4() if self.tied else self.store.weight(self.head_name)
        bias = self._float(f"{self.head_name}.bias", head.bias)
        self.head = self.swap(self.head_name, Int4Head(weight, bias, dtype, backend))
        if not self.tied:
            self.modules[self.head_name] = self.head

    def _replace_experts(self) -> None:
        int4 = {site.parameter for site in self.sites if site.role == "expert"}
        for found in fused_experts(self.model):
            first, second = found.shapes
            if f"{found.path}.{first}" not in int4:
                continue
            names = [(found.matrix(one, first), found.matrix(one, second)) for one in range(found.count)]
            source = StoredExperts(self.store, names)
            experts = replace_experts(self.model.get_submodule(found.path), first, source, self.numerics.backend)
            self.experts[found.path] = ExpertPlaces(experts, names)
            self._adapt_experts(experts, found)

    def _adapt_experts(self, experts: Int4Experts, found: FusedExperts) -> None:
        if self.lora is None:
            return
        adapted = [name for name in found.shapes if self.lora.targets_parameter(f"{found.path}.{name}")]
        for name in adapted:
            path = f"{found.path}.{name}"
            adapter = ExpertAdapter(
                found.count,
                found.shapes[name],
                self.lora.rank(path),
                self.lora.scaling(path),
                nested=name != adapted[-1],
                device=self.numerics.device,
                dtype=self.numerics.adapter_dtype,
                generator=self.generator,
            )
            experts.add_module(name, adapter)

    def _linear(self, name: str, old: nn.Linear | Conv1D) -> Int4Linear:
        bias = self._float(f"{name}.bias", old.bias)
        frozen = Int4Linear(self.store.weight(name), bias, self.numerics.dtype, self.numerics.backend)
        if self.lora is None or not self.lora.targets(name):
            return frozen
        transposed, device = isinstance(old, Conv1D), self.numerics.device
        return with_adapter(frozen, name, self.lora, self.numerics.adapter_dtype, self.generator, transposed, device)

    def _float(self, name: str, expected: Tensor | None) -> Tensor | None:
        """The float parameter ``name`` on the device; None where the model has none."""
        if expected is None:
            return None
        if (site := self.decoded.get(name)) is not None:
            weight = decode(self.store.weight(site.name), torch.float32)
            weight = weight.t().contiguous() if site.transposed else weight
            return weight.to(self.numerics.device, self._dtype(name, self.numerics.dtype))
        if name not in self.float_of:
            raise ValueError(f"store {self.store.directory} has no tensor {name}")
        value = self.store.float_tensor(self.float_of[name])
        if value.shape != expected.shape:
            raise ValueError(
                f"store {self.store.directory}: {name} has shape {tuple(value.shape)}, "
                f"the config says {tuple(expected.shape)}"
            )
        return value.to(self.numerics.device, self._dtype(name, self.numerics.dtype))

    def _dtype(self, name: str, usual: torch.dtype) -> torch.dtype:
        return torch.float32 if self.stays_float32(name) else usual

    def _place_floats(self) -> None:
        """Puts the parameters that stay float in place, and moves the buffers."""
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
            owner._buffers[attribute] = buffer.to(self.numerics.device)
