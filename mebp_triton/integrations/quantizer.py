"""transformers' quantizer plug-in: ``from_pretrained(..., quantization_config=Int4Config())`` loads a model as int4.

The linear layers of the base model become ``Int4Linear``, one tensor at a time while loading; embedding, heads and
norms stay float. ``save_pretrained`` writes packed codes as ``weight``, and the bytes of ``scales`` and ``minimum``:
bytes are not cast on loading by any version of transformers. Importing this module registers the method ``mebp_int4``.

transformers 5 quantizes through an operation of its loader (``get_quantize_ops``), 4.57 through
``create_quantized_param``; both end in ``Int4Quantizer.put``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mebp_triton.kernels.layout import GROUP_SIZES, LAYOUT, SCHEMES, Int4Weight, Scheme, group_count, padded
from mebp_triton.lora import Int4Linear, Int4LoRALinear
from mebp_triton.quantization import NF4, quantize_matrix

METHOD = "mebp_int4"
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model, and, in a saved one's ``config.json``, how it was quantized.

    Weights are quantized from their value in the ``dtype`` that ``from_pretrained`` loads.

    Args:
        scheme, group_size, scale_search: as in ``quantize``; "codebook" is NF4.
        modules_to_not_convert: modules that stay float with all they hold: paths, or the last parts of paths
            ("layers.0.mlp", "q_proj"). Embedding and heads always stay float.
        layout: of the packed codes, written by ``save_pretrained``.
        float32_scales: layers whose scales float16 cannot hold, written by ``save_pretrained``.

    Raises:
        ValueError: a value does not fit.
    """

    def __init__(
        self,
        scheme: Scheme = "symmetric",
        group_size: int = 64,
        scale_search: bool = True,
        modules_to_not_convert: Iterable[str] | None = None,
        layout: str = LAYOUT,
        float32_scales: Iterable[str] = (),
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is no setting of Int4Config")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        if type(group_size) is not int or group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
        if layout != LAYOUT:
            raise ValueError(f"int4 weights of layout {layout!r} cannot be read, only {LAYOUT!r}: quantize anew")
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method: Any = METHOD
        self.scheme, self.group_size, self.scale_search = scheme, group_size, scale_search
        self.modules_to_not_convert = _names("modules_to_not_convert", modules_to_not_convert or ())
        self.layout, self.float32_scales = layout, _names("float32_scales", float32_scales)


def _names(what: str, names: Iterable[str]) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{what} must be a list of module names, got {listed!r}")
    return listed


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The layers that become int4: every plain linear layer and Conv1D of the base model, by path in ``model``.

    Heads lie outside of the base model, or are the output embeddings; what transformers keeps in float32 stays float.
    """
    head = model.get_output_embeddings()
    base, start = model.base_model, _base_prefix(model)
    kept = [*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    return {
        start + name: module
        for name, module in base.named_modules()
        if (type(module) in (nn.Linear, Conv1D) or isinstance(module, Int4Linear))
        and module is not head
        and not _named(name, kept)
    }


def _base_prefix(model: Any) -> str:
    """Names in a config leave it out: a model may be loaded with its head or without."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _named(path: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if f".{name}." in f".{path}."]


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """What transformers asks while it loads, saves and trains; nothing to be called by hand."""

    requires_calibration = False
    requires_parameters_quantization = True

    def __init__(self, quantization_config: Int4Config, **kwargs: Any) -> None:
        # A copy: what is found out about one model is written into it.
        self.config = copy.deepcopy(quantization_config)
        super().__init__(self.config, **kwargs)
        self.model: Any = None
        self.prefix = ""
        self.layers: dict[str, nn.Module] = {}

    # Loading.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map offloads layers to disk, which int4 layers do not support: use mebp_triton.load"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        found = linear_layers(model)
        self.prefix = _base_prefix(model)
        skipped = self.config.modules_to_not_convert
        unknown = [name for name in skipped if not any(_named(path, [name]) for path, _ in model.named_modules())]
        if unknown and not self.pre_quantized:
            raise ValueError(f"modules_to_not_convert: {type(model).__name__} has no module {unknown[0]!r}")
        self.layers = {path: module for path, module in found.items() if not _named(path, skipped)}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no plain linear layer to quantize")
        if self.pre_quantized:
            for path, module in self.layers.items():
                self._expect_bytes(path, module)
        return model

    def _expect_bytes(self, path: str, module: Any) -> None:
        """Makes a float layer on the meta device one that takes packed codes and the bytes of its scales."""
        rows, columns = reversed(module.weight.shape) if type(module) is Conv1D else module.weight.shape
        scales = torch.empty(
            group_count(columns, self.config.group_size), rows, dtype=self._scale_dtype(path), device="meta"
        )
        packed = torch.empty(rows, padded(columns) // 2, dtype=torch.uint8, device="meta")
        minimum = torch.empty_like(scales) if self.config.scheme == "affine" else None
        module.__class__ = Int4Linear
        module._init_int4(Int4Weight(packed, scales, columns, self.config.group_size, minimum), torch.float32, "auto")
        for name in self._scale_names():
            module._buffers[name] = module._buffers[name].view(torch.uint8)
        if BEFORE_5:
            # Initializers run over these, and what has a dtype of its own shows that it was loaded.
            module.weight.data = module.weight.data.float()
            module._buffers.update({name: module._buffers[name].float() for name in self._scale_names()})
        # A layer that the files lack is an error below, not one to be initialized.
        module._is_hf_initialized = True

    def _scale_dtype(self, path: str) -> torch.dtype:
        wide = any(f".{path}".endswith(f".{name}") for name in self.config.float32_scales)
        return torch.float32 if wide else torch.float16

    def _scale_names(self) -> list[str]:
        return ["scales", "minimum"] if self.config.scheme == "affine" else ["scales"]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and path in self.layers

    def get_quantize_ops(self) -> Any:
        from transformers.core_model_loading import ConversionOps

        class Quantize(ConversionOps):
            def __init__(self, quantizer: Int4Quantizer) -> None:
                self.quantizer = quantizer

            def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
                rest = {}
                for name, value in input_dict.items():
                    if self.quantizer.param_needs_quantization(kwargs.get("model"), name):
                        self.quantizer.put(name, value[0] if isinstance(value, list) else value)
                        kwargs["missing_keys"].discard(name)
                    else:
                        rest[name] = value
                return rest

        return Quantize(self)

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.put(param_name, param_value.to(target_device))

    def put(self, param_name: str, value: Tensor) -> None:
        """Quantizes ``value``, and turns the float layer it belongs to into an int4 one."""
        path = param_name.rpartition(".")[0]
        module: Any = self.layers[path]
        if value.shape != module.weight.shape:
            raise ValueError(
                f"{param_name} has shape {tuple(value.shape)}, the model wants {tuple(module.weight.shape)}: "
                f"the weights and the config do not belong together"
            )
        matrix = value.t().contiguous() if type(module) is Conv1D else value
        try:
            weight, _ = quantize_matrix(matrix, self.config.scheme, self.config.group_size, self.config.scale_search)
        except ValueError as problem:
            raise ValueError(f"{param_name}: {problem}") from None
        module.__class__ = Int4Linear
        module._init_int4(_own_codebook(weight), value.dtype, "auto")
        module.weight._is_hf_initialized = True

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        for key in missing_keys:
            path, _, name = key.rpartition(".")
            if path in self.layers and self.pre_quantized:
                raise _lacking(key)
            if path in self.layers and name == "weight":
                self._keep_float(path)
        return missing_keys

    def _keep_float(self, path: str) -> None:
        """The checkpoint has no weight for this layer: transformers initializes one, for training."""
        del self.layers[path]
        self.config.modules_to_not_convert.append(path.removeprefix(self.prefix))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.model = weakref.ref(model)
        for path, module in list(self.layers.items()):
            if self.pre_quantized:
                self._take_bytes(path, module)
            elif not isinstance(module, Int4Linear):
                self._keep_float(path)
                continue
            assert isinstance(module, Int4Linear)
            module.compute_dtype = model.dtype
            weight = module.int4()  # refuses what does not fit together
            if not self.pre_quantized and weight.scales.dtype == torch.float32:
                self.config.float32_scales.append(path.removeprefix(self.prefix))
        model.config.quantization_config = self.config
        return model

    def _take_bytes(self, path: str, module: Any) -> None:
        """The bytes that were loaded, as scales."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor.device.type == "meta":
                raise ValueError(f"device_map offloads {path}, which int4 layers do not support: use mebp_triton.load")
            # transformers 5 marks what it loaded; 4.57 left floats where it ignored a mismatch.
            marked = BEFORE_5 or getattr(tensor, "_is_hf_initialized", False)
            if not marked or (name != "bias" and tensor.dtype != torch.uint8):
                raise _lacking(f"{path}.{name}")
        for name in self._scale_names():
            scales = module._buffers[name].clone().view(self._scale_dtype(path))
            if not bool(scales.isfinite().all()):
                raise ValueError(f"{path}.{name} is not finite: the checkpoint is damaged, save or download it again")
            module._buffers[name] = scales
        if self.config.scheme == "codebook":
            module._buffers["codebook"] = NF4.to(module.weight.device, copy=True)

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, for ``device_map="auto"``."""
        return 0.5 + (4 if self.config.scheme == "affine" else 2) / self.config.group_size

    # Saving and training.

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], dict]:
        return dict(saved_tensors(model)), {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether ``Trainer`` may train the model without PEFT: where our own adapters are in it."""
        model = None if self.model is None else self.model()
        return model is not None and any(isinstance(module, Int4LoRALinear) for module in model.modules())


def saved_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict of ``model`` as ``save_pretrained`` writes it: scales as bytes, no codebooks."""
    int4 = {f"{path}." for path, module in model.named_modules() if isinstance(module, Int4Linear)}
    for key, tensor in model.state_dict().items():
        path, _, name = key.rpartition(".")
        if f"{path}." not in int4 or name not in Int4Linear.INT4_BUFFERS:
            yield key, tensor
        elif name != "codebook":
            yield key, tensor.contiguous().view(torch.uint8)


def _own_codebook(weight: Int4Weight) -> Int4Weight:
    """With a codebook of its own: tensors that layers share are not saved."""
    return weight if weight.codebook is None else replace(weight, codebook=weight.codebook.clone())


def _lacking(key: str) -> ValueError:
    return ValueError(f"the checkpoint lacks {key}, part of an int4 layer: save or download it again")
