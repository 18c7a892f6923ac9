"""transformers' models with int4 layers, and the same models with those layers' decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from models import batch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mebp_triton import Int4Config, Int4Linear
from mebp_triton.kernels.reference import decode


def from_pretrained(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The causal language model of ``directory`` by transformers alone, whatever its weights are."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def quantized(directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A float model, quantized while it is loaded; ``settings`` are ``Int4Config``'s."""
    return from_pretrained(directory, dtype, quantization_config=Int4Config(**({"group_size": 32} | settings)))


def with_bitsandbytes(directory: Path, quant_type: str = "nf4") -> Any:
    """A float model, quantized by bitsandbytes while it is loaded."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return from_pretrained(directory, quantization_config=settings)


def int4_layers(model: Any) -> dict[str, Int4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


def assert_same_codes(model: Any, truth: Any) -> None:
    """Both models have the same int4 layers, to the bit."""
    layers, wanted = int4_layers(model), int4_layers(truth)
    assert layers.keys() == wanted.keys() and layers
    for name, layer in layers.items():
        tensors, expected = layer.int4().tensors(), wanted[name].int4().tensors()
        assert tensors.keys() == expected.keys()
        for kind, tensor in tensors.items():
            assert tensor.dtype == expected[kind].dtype and torch.equal(tensor, expected[kind]), (name, kind)


@torch.no_grad()
def decoded_twin(directory: Path, model: Any, dtype: torch.dtype) -> Any:
    """The float model of ``directory`` with the decoded weights of the int4 layers of ``model``."""
    twin = from_pretrained(directory, dtype)
    for name, layer in int4_layers(model).items():
        value, old = decode(layer.int4(), torch.float64), twin.get_submodule(name)
        old.weight.copy_(value.t() if isinstance(old, Conv1D) else value)
    return twin


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(2, 12, None)["input_ids"]).logits
