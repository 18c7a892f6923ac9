"""What GGUF calls the tensors of a model, and where it puts their rows: for reading a file, and for writing one.

The names come from the ``gguf`` package, and what an architecture does to its matrices from transformers' code for
undoing it.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mebp_triton.system.foreign_errors import one_line

from .gguf_architectures import ARCHITECTURES

SAFETENSORS = "give the model as safetensors"
# What llama.cpp runs under another model's architecture.
RELATIVES = {"mistral": "llama"}


def architecture_of(model_type: str) -> str:
    """The GGUF architecture of a ``model_type`` of transformers.

    Raises:
        ValueError: none is known.
    """
    known = {each.model_type: arch for arch, each in ARCHITECTURES.items()} | RELATIVES
    if model_type not in known:
        raise ValueError(f"how llama.cpp names the tensors of a {model_type} model is not known here")
    return known[model_type]


class GgufLayout:
    """The names and the order of rows that files of an architecture have.

    Args:
        arch: the architecture, as ``general.architecture`` states it.
        config: the config of the model, as transformers has it.
        where: the file or the model, for messages.
    """

    def __init__(self, arch: str, config: PretrainedConfig, where: str) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.arch, self.where = arch, where
        self._processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config.to_dict())
        self._names: dict[str, str] = {}

    def names(self, model: PreTrainedModel) -> dict[str, str]:
        """The parameters and buffers of ``model`` by GGUF's names.

        Fused experts are one parameter, whose name has no ".weight"; a file has them as several tensors with it.

        Raises:
            ValueError: the architecture has no names here.
        """
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        # transformers 4 has no such parameter, and no processor in need of it.
        takes_processor = "processor" in inspect.signature(get_gguf_hf_weights_map).parameters
        extra: dict[str, Any] = {"processor": self._processor} if takes_processor else {}
        with one_line(f"{self.where}: no tensor names for architecture {self.arch!r}", SAFETENSORS):
            self._names = get_gguf_hf_weights_map(_Outline(model), model_type=self.arch, **extra)
        return self._names

    def process(self, name: str, values: np.ndarray, made: dict[str, Tensor]) -> np.ndarray | None:
        """Undoes what the converter to GGUF did to the tensor ``name``, by transformers' code for the architecture.

        Returns None where that code put its result into ``made`` instead, as it does with experts.
        """
        result = self._processor.process(
            weights=values, name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": made}
        )
        return None if result.name is None else result.weights

    def row_order(self, name: str, shape: tuple[int, ...], transposed: bool = False) -> Tensor | None:
        """The row of a file's matrix that each row of the parameter comes from; None if more changed than places.

        A converter may have permuted rows (Llama's queries and keys), transposed a matrix (GPT-2) or changed its
        values. What an architecture does is not looked up but observed: a matrix that holds its own row numbers, and
        one that holds its column numbers, go through transformers' code for undoing it.

        Args:
            name: GGUF's name of the matrix.
            shape: its shape in the file, ``(out, in)``.
            transposed: whether the parameter is ``[in, out]``.

        Returns:
            Int64 ``[out]``.
        """
        rows, columns = (np.arange(size, dtype=np.float32) for size in shape)
        row_numbers = np.broadcast_to(rows[:, None], shape)
        moved = self.process(name, row_numbers, {})
        if moved is row_numbers and not transposed:
            return torch.arange(shape[0])
        beside = self.process(name, np.broadcast_to(columns, shape), {})
        if moved is None or beside is None:
            return None
        if transposed:
            moved, beside = moved.T, beside.T
        if moved.shape != shape or beside.shape != shape:
            return None
        order = moved[:, 0]
        whole_rows = np.array_equal(moved, np.broadcast_to(order[:, None], shape))
        if not whole_rows or not np.array_equal(np.sort(order), rows) or not (beside == columns).all():
            return None
        return torch.from_numpy(order.astype(np.int64))


class _Outline:
    """The two upper levels of a model, to be shown to ``get_gguf_hf_weights_map`` in its place.

    That function descends into every submodule, in case the file was made from the base model, and makes the table of
    all names anew in each. This takes seconds for a small model and minutes for a deep one. A base model is near the
    top, so two levels are enough.
    """

    def __init__(self, module: torch.nn.Module, levels: int = 2) -> None:
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self._children = dict(module.named_children()) if levels else {}
        self._levels = levels

    def named_children(self) -> list[tuple[str, _Outline]]:
        return [(name, _Outline(child, self._levels - 1)) for name, child in self._children.items()]
