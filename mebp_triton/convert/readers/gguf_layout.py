"""Names and row orders of a model's tensors in GGUF files, for reading a file and for writing one.

The names come from the ``gguf`` package; what it does not know, and what undoes the converter's changes, from the table
of architectures.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mebp_triton.system.foreign_errors import one_line

from .gguf_architectures import ARCHITECTURES

SAFETENSORS = "give the model as safetensors"
# Experts that are one parameter. Files have gate and up apart, or joined.
EXPERTS = {
    "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight"),
    "experts.down_proj": ("ffn_down_exps.weight",),
}
# Models of transformers that llama.cpp runs under another model's architecture.
RELATIVES = {"mistral": ("llama", "mistral3"), "deepseek_v2": ("deepseek2",), "granitemoe": ("granitemoe",)}


def architectures_of(model_type: str) -> tuple[str, ...]:
    """The GGUF architectures that a ``model_type`` of transformers may have, the usual one first.

    Raises:
        ValueError: none is known.
    """
    known = tuple(arch for arch, each in ARCHITECTURES.items() if each.model_type == model_type)
    if not (known := known + RELATIVES.get(model_type, ())):
        raise ValueError(
            f"how llama.cpp names the tensors of a {model_type} model is not known here: make a model directory by "
            f"`mebp merge`, and convert that by llama.cpp's convert_hf_to_gguf.py"
        )
    return known


# What stands before the names of a language model in a model for text and images, and in no file.
LANGUAGE_MODEL = "language_model."


class Order(NamedTuple):
    """The row, and the column, of a file's matrix that each one of the parameter comes from; int64."""

    rows: Tensor
    columns: Tensor


class GgufLayout:
    """The names and the order of rows that files of an architecture have.

    Args:
        arch: the architecture, as ``general.architecture`` states it.
        config: the config of the model, as transformers has it.
        where: the file or the model, for messages.
    """

    def __init__(self, arch: str, config: PretrainedConfig, where: str) -> None:
        self.arch, self.where = arch, where
        self._known, self._config = ARCHITECTURES[arch], config

    def names(self, model: PreTrainedModel) -> dict[str, str]:
        """The parameters and buffers of ``model`` by GGUF's names.

        A parameter may have several: those that the file has are its parts, in this order. A name without ".weight"
        may have it in a file.

        Raises:
            ValueError: the ``gguf`` package does not know the architecture.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        if self.arch not in numbers:
            raise ValueError(f"{self.where}: the installed gguf has no names for {self.arch!r}: pip install -U gguf")
        table = get_tensor_name_map(numbers[self.arch], self._config.num_hidden_layers)
        prefix = model.base_model_prefix + "."
        found: dict[str, str] = {}
        for parameter in model.state_dict():
            stem, dot, last = parameter.rpartition(".")
            stem, suffix = (stem, dot + last) if last in ("weight", "bias") else (parameter, "")
            stem = stem.replace(LANGUAGE_MODEL, "", 1)
            # Some models were converted from the base model, without the prefix that its names have here.
            name = table.get_name(stem) or table.get_name(stem.removeprefix(prefix))
            for each in self._special_names(parameter) or ([] if name is None else [name + suffix]):
                found.setdefault(each, parameter)
        return found

    def _special_names(self, parameter: str) -> list[str]:
        """The names of a parameter that the ``gguf`` package does not know."""
        block = re.search(r"\.(\d+)\.", parameter)
        ends = {**EXPERTS, **self._known.names}
        names = next((names for end, names in ends.items() if parameter.endswith("." + end)), ())
        return [f"blk.{block[1]}.{name}" for name in names] if block else []

    def process(self, name: str, values: np.ndarray) -> np.ndarray:
        """Undoes what the converter to GGUF did to the tensor ``name``."""
        undo = next((undo for end, undo in self._known.undo.items() if name.endswith(end)), None)
        if undo is None:
            return values
        with one_line(f"{self.where}: {name} of shape {values.shape} is not as its architecture has it", SAFETENSORS):
            return undo(values, self._config)

    def applies_adapters(self, name: str) -> bool:
        """Whether llama.cpp computes the matrix ``name`` with an adapter's part for it."""
        return re.sub(r"^blk\.\d+\.", "", name) not in self._known.adapterless

    def order(self, name: str, shape: tuple[int, ...], transposed: bool = False) -> Order | None:
        """Tells where rows and columns of a file's matrix go; None if more changed than places.

        A converter may have permuted rows (Llama's queries and keys), transposed a matrix (GPT-2) or changed its
        values. What an architecture does is not looked up but observed: a matrix that holds its own row numbers, and
        one that holds its column numbers, go through what undoes it.

        Args:
            name: GGUF's name of the matrix.
            shape: its shape in the file, ``(out, in)``.
            transposed: whether the parameter is ``[in, out]``.
        """
        rows, columns = (np.arange(size, dtype=np.float32) for size in shape)
        row_numbers = np.broadcast_to(rows[:, None], shape)
        moved = self.process(name, row_numbers)
        if moved is row_numbers and not transposed:
            return Order(*map(torch.arange, shape))
        beside = self.process(name, np.broadcast_to(columns, shape))
        if transposed:
            moved, beside = moved.T, beside.T
        if moved.shape != shape or beside.shape != shape:
            return None
        order, place = moved[:, 0], beside[0]
        whole = np.array_equal(moved, np.broadcast_to(order[:, None], shape)) and (beside == place).all()
        if not whole or not np.array_equal(np.sort(order), rows) or not np.array_equal(np.sort(place), columns):
            return None
        return Order(*(torch.from_numpy(numbers.astype(np.int64)) for numbers in (order, place)))

    def row_order(self, name: str, shape: tuple[int, ...], transposed: bool = False) -> Tensor | None:
        """The row of a file's matrix that each row of the parameter comes from, int64 ``[out]``; see ``order``."""
        order = self.order(name, shape, transposed)
        return None if order is None else order.rows

    def join(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        """The parameter that parts are, the first called ``name``: their rows below each other, or by turns."""
        if len(parts) == 1:
            return parts[0]
        if self._known.interleaved:
            return np.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
        rows = np.concatenate(parts, max(0, parts[0].ndim - 2))
        undo = next((undo for end, undo in self._known.joined.items() if name.endswith(end)), None)
        return rows if undo is None else undo(rows, self._config)

    def join_rows(self, name: str, orders: list[Tensor]) -> Tensor:
        """The rows, in parts that lie below each other, that each row of their parameter comes from; see ``join``."""
        starts = np.cumsum([0, *map(len, orders)])
        shifted = [(order + start).numpy() for order, start in zip(orders, starts.tolist(), strict=False)]
        return torch.from_numpy(self.join(name, shifted))
