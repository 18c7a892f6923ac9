"""transformers' quantizer plug-in: ``from_pretrained(..., quantization_config=Int4Config())`` loads a model as int4.

The linear layers of the base model become ``Int4Linear``, one tensor at a time while loading; embedding, heads and
norms stay float. ``save_pretrained`` writes packed codes as ``weight``, and ``scales`` and ``minimum`` as their bytes:
no version of transformers casts bytes when it loads them. Importing this module registers the method ``mebp_int4``.

transformers 5 quantizes by an operation of its loader (``get_quantize_ops``), and 4.57 calls
``create_quantized_param``; both end in ``Int4Quantizer.quantize_into``. When int4 files are loaded, 5 marks every
tensor that it took from them. 4.57 marks none and runs initializers over the others, which are known by their dtype.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from mebp_triton.kernels.group_fit import NF4
from mebp_triton.kernels.layout import Int4Weight, tensor_shapes
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.models.names import current_names
from mebp_triton.models.plain_linear import is_plain_linear
from mebp_triton.models.saving import ignore_in_ddp
from mebp_triton.models.skeleton import contains_any

from .bitsandbytes_layers import is_linear4bit
from .int4_config import METHOD, Int4Config
from .model_layers import base_prefix, check_names, inner_model, linear_layers, path_without_peft
from .peft_layer import register_where_installed

BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """Answers transformers while it loads, saves and trains a model. Nothing here is to be called by hand.

    Attributes:
        layers: the layers that are, or become, int4, by path.
        prefix: the prefix of the base model's names; see ``base_prefix``.
        model: a weak reference to the loaded model; None until then.
    """

    requires_calibration = False
    requires_parameters_quantization = True

    def __init__(self, quantization_config: Int4Config, **kwargs: Any) -> None:
        # The settings are copied because saving writes into them what it finds out about this model.
        self.config = copy.deepcopy(quantization_config)
        super().__init__(self.config, **kwargs)
        self.model: Any = None
        self.prefix = ""
        self.layers: dict[str, nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy or a pickle of the model, whose quantizer refers to that model."""
        return vars(self) | {"model": None if self.model is None else self.model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.model = None if self.model is None else weakref.ref(self.model)

    # Loading.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map offloads layers to disk, which int4 layers do not support: use mebp_triton.load"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.prefix = base_prefix(model)
        skipped = self.config.modules_to_not_convert
        if not self.pre_quantized:
            check_names("modules_to_not_convert", skipped, model)
        layers = linear_layers(model, self.pre_quantized)
        plain = {path: module for path, module in layers.items() if is_plain_linear(module)}
        self.layers = {path: module for path, module in plain.items() if not contains_any(path, skipped)}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no plain linear layer to quantize")
        if self.pre_quantized:
            _check_experts(model, kwargs.get("checkpoint_files"))
            for path, module in self.layers.items():
                self._expect_bytes(path, module)
        return model

    def _expect_bytes(self, path: str, module: Any) -> None:
        """Turns a float layer on the meta device into one whose tensors have the shapes of packed codes and bytes."""
        rows, columns = reversed(module.weight.shape) if type(module) is Conv1D else module.weight.shape
        form = Form(self.config.scheme, self.config.group_size, self.config.bits)
        shapes = tensor_shapes(rows, columns, form, self._scale_dtype(path))
        shapes.pop("codebook", None)  # no file has it; see ``_take_bytes``
        parts = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in shapes.items()}
        module.__class__ = Int4Linear
        module._init_int4(Int4Weight(in_features=columns, group_size=form.group_size, **parts), torch.float32, "auto")
        for name in self._scale_names():
            module._buffers[name] = module._buffers[name].view(torch.uint8)
        if BEFORE_5:
            # 4.57 initializes what it does not load, and its initializers need floats. A tensor that was loaded comes
            # in the file's own dtype, bytes, and so ``_take_bytes`` can tell it from one that was initialized.
            module.weight.data = module.weight.data.float()
            module._buffers.update({name: module._buffers[name].float() for name in self._scale_names()})
        # A layer that the files lack must not be initialized: ``update_missing_keys`` makes it an error.
        module._is_hf_initialized = True

    def _scale_dtype(self, path: str) -> torch.dtype:
        return torch.float32 if path.removeprefix(self.prefix) in self.config.float32_scales else torch.float16

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
                        self.quantizer.quantize_into(name, value[0] if isinstance(value, list) else value)
                        # The loader sets only what is returned, and would count this weight as missing.
                        kwargs["missing_keys"].discard(name)
                    else:
                        rest[name] = value
                return rest

        return Quantize(self)

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.quantize_into(param_name, param_value.to(target_device))

    def quantize_into(self, param_name: str, value: Tensor) -> None:
        """Quantizes the weight ``value``, and turns its float layer into an int4 one."""
        path = param_name.rpartition(".")[0]
        module: Any = self.layers[path]
        if value.shape != module.weight.shape:
            raise ValueError(
                f"{param_name} has shape {tuple(value.shape)}, the model wants {tuple(module.weight.shape)}: "
                f"the weights and the config do not belong together"
            )
        matrix = value.t().contiguous() if type(module) is Conv1D else value
        try:
            config = self.config
            weight, _ = quantize_matrix(matrix, config.scheme, config.group_size, config.scale_search, bits=config.bits)
        except ValueError as problem:
            raise ValueError(f"{param_name}: {problem}") from None
        module.__class__ = Int4Linear
        # Every layer has a codebook of its own: transformers does not save tensors that layers share.
        codebook = None if weight.codebook is None else weight.codebook.clone()
        module._init_int4(replace(weight, codebook=codebook), value.dtype, "auto")
        module.weight._is_hf_initialized = True

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        for key in missing_keys:
            path, _, name = key.rpartition(".")
            if path in self.layers and self.pre_quantized:
                raise _missing_tensor(key)
            if path in self.layers and name == "weight":
                del self.layers[path]  # transformers initializes it as a float layer, which is to be trained
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.model = weakref.ref(model)
        for path, module in self.layers.items():
            if self.pre_quantized:
                self._take_bytes(path, module)
            if isinstance(module, Int4Linear):  # else the checkpoint has no weight for it
                module.compute_dtype = model.dtype
                module.int4()  # raises where the tensors do not fit together
        model.config.quantization_config = self.config
        ignore_in_ddp(model, Int4Linear)
        register_where_installed()
        return model

    def _take_bytes(self, path: str, module: Any) -> None:
        """Takes the bytes that were loaded as scales. ValueError where a tensor is missing, elsewhere or not finite."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor.device.type == "meta":
                raise ValueError(f"device_map offloads {path}, which int4 layers do not support: use mebp_triton.load")
            marked = BEFORE_5 or getattr(tensor, "_is_hf_initialized", False)
            if not marked or (name != "bias" and tensor.dtype != torch.uint8):
                raise _missing_tensor(f"{path}.{name}")
        for name in self._scale_names():
            scales = module._buffers[name].clone().view(self._scale_dtype(path))
            if not bool(scales.isfinite().all()):
                raise ValueError(f"{path}.{name} is not finite: the checkpoint is damaged, save or download it again")
            module._buffers[name] = scales
        if self.config.scheme == "codebook":
            module._buffers["codebook"] = NF4.to(module.weight.device, copy=True)

    @property
    def quantized_element_size(self) -> float:
        """The bytes that a weight takes with its share of the scales, for ``device_map="auto"``."""
        return self.config.bits / 8 + (4 if self.config.scheme == "affine" else 2) / self.config.group_size

    # Saving and training.

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves PEFT's adapters alone
        self.config = self.quantization_config = model.config.quantization_config = self._description(model)
        return dict(saved_tensors(model)), {}

    def _description(self, model: Any) -> Int4Config:
        """The settings by which ``from_pretrained`` finds the int4 layers that ``model`` has now.

        Raises:
            ValueError: there are no such settings, or the model has an adapter, which would be lost.
        """
        prefix, candidates = base_prefix(model), linear_layers(model, saved=True)
        int4: dict[str, Int4Weight] = {}
        for path, module in model.named_modules():
            if isinstance(module, Int4LoRALinear):
                raise ValueError(f"{path} has an adapter, which a saved model has no place for: use save_adapter")
            if is_linear4bit(module):
                raise ValueError(f"{path} is bitsandbytes' layer, others are int4: no files hold both, replace all")
            if isinstance(module, Int4Linear):
                if path != path_without_peft(path):
                    raise ValueError(f"{path} is inside a layer of PEFT: save the PeftModel, or unload() it first")
                int4[path] = module.int4()
        floats = [path.removeprefix(prefix) for path, module in candidates.items() if is_plain_linear(module)]
        lost = [path for path in int4 if path not in candidates or contains_any(path, floats)]
        if lost:
            raise ValueError(f"{lost[0]} is int4, and from_pretrained would take it for a float layer: not saved")
        forms = {weight.form for weight in int4.values()}
        if any(w.codebook is not None and not torch.equal(w.codebook.cpu(), NF4) for w in int4.values()):
            raise ValueError("the model has FP4 weights, which saved int4 models do not have: save the adapter alone")
        if any(w.two_level for w in int4.values()):
            raise ValueError(
                "the model has scales of two levels, which saved int4 models do not have: save the adapter alone"
            )
        if len(forms) != 1:
            found = "; ".join(map(str, sorted(forms)))
            raise ValueError(f"a saved model has int4 weights of one scheme, group size and width, this one: {found}")
        [(scheme, group_size, bits)] = forms
        wide = [path.removeprefix(prefix) for path, w in int4.items() if w.scales.dtype == torch.float32]
        return Int4Config(scheme, group_size, self.config.scale_search, floats, float32_scales=wide, bits=bits)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether ``Trainer`` may train the model without PEFT: where our own adapters are in it."""
        model = None if self.model is None else self.model()
        return model is not None and any(isinstance(module, Int4LoRALinear) for module in model.modules())


def saved_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``model`` by name as ``save_pretrained`` writes them: scales as bytes, no codebooks."""
    int4 = {f"{path}." for path, module in model.named_modules() if isinstance(module, Int4Linear)}
    for key, tensor in model.state_dict().items():
        path, _, name = key.rpartition(".")
        if f"{path}." not in int4 or name not in Int4Linear.INT4_BUFFERS:
            yield key, tensor
        elif name != "codebook":
            yield key, tensor.contiguous().view(torch.uint8)


def _missing_tensor(key: str) -> ValueError:
    return ValueError(
        f"the checkpoint lacks {key}, part of an int4 layer: save or download it again, or load it by the version of "
        f"transformers that saved it"
    )


def _check_experts(model: Any, files: Iterable[Any] | None) -> None:
    """Raises ValueError where an int4 layer of ``files`` is only a part of a parameter in ``model``.

    Experts are linear layers for transformers 4, and slices of one parameter for transformers 5.
    """
    keys = []
    for file in files or ():
        with safe_open(file, framework="pt") as opened:
            keys += [key for key in opened.keys() if key.endswith(".scales")]  # noqa: SIM118
    modules = dict(model.named_modules())
    for name in current_names(model, keys).values():
        path = name.rpartition(".")[0]
        while path not in modules:  # the path of the model itself is ""
            path = path.rpartition(".")[0]
        if not isinstance(modules[path], nn.Linear | Conv1D) and modules[path]._parameters:
            raise ValueError(
                f"{name.rpartition('.')[0]} is an int4 layer, and a part of {path} in transformers "
                f"{transformers.__version__}: load the model by transformers {model.config.transformers_version}, "
                f"which saved it"
            )


def mark_as_int4(model: Any) -> None:
    """Tells transformers and DistributedDataParallel about the int4 layers of a model whose layers were replaced."""
    inner: Any = inner_model(model)
    if hasattr(inner, "mebp"):
        return  # ``load`` has told them
    ignore_in_ddp(inner, Int4Linear)
    if not isinstance(inner, PreTrainedModel):
        return
    if hasattr(inner, "is_loaded_in_4bit") and not any(is_linear4bit(module) for module in inner.modules()):
        # Trainers and PEFT must not take the model for one of bitsandbytes any more.
        flags = ("is_loaded_in_4bit", "is_4bit_serializable", "is_quantized", "quantization_method")
        for name in (*flags, "hf_quantizer"):
            vars(inner).pop(name, None)
        for name in ("quantization_config", "_is_quantized", "_pre_quantization_dtype"):
            vars(inner.config).pop(name, None)
    if not isinstance(getattr(inner, "hf_quantizer", None), Int4Quantizer):
        vars(inner)["hf_quantizer"] = Int4Quantizer(Int4Config())
