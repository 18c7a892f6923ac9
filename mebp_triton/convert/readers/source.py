"""The protocol that every reader of a foreign checkpoint follows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import Form, Scheme


class NativeForm(NamedTuple):
    """The form of codes that ``quantize`` takes over as they are.

    ``tables``: also in embedding and head. ``experts_alone``: in nothing but the experts of a mixture.
    """

    scheme: Scheme
    group_size: int
    scale_dtype: torch.dtype
    bits: int = 4
    tables: bool = False
    experts_alone: bool = False

    @property
    def form(self) -> Form:
        return Form(self.scheme, self.group_size, self.bits)


class Source(Protocol):
    """A checkpoint on disk.

    Attributes:
        config: the config that ``AutoModelForCausalLM.from_config`` takes. It names the causal language model in
            ``architectures``, and no quantisation.
        description: the format and the name of the file or directory; the store's manifest has it as ``source``.
        files: the files of the weights, in a fixed order.
        decoded: what the parameters were that ``read`` had to decode from codes that no scheme of ours holds, by name.
    """

    config: PretrainedConfig
    description: str
    files: list[Path]
    decoded: dict[str, str]

    def bind(self, model: PreTrainedModel) -> None:
        """Finds every parameter of ``model`` (on the meta device is enough) in the files.

        Raises:
            ValueError: a parameter is not there, or cannot be used.
        """

    def read(self, name: str) -> Tensor | Int4Weight:
        """Reads one parameter or persistent buffer of the bound model, by the model's own name for it.

        The matrix of one expert in a parameter of all of them (``models.experts``) has the name of its matrix in a
        store, and ".weight".

        Returns:
            A float tensor of the parameter's own shape, or an ``Int4Weight`` whose logical ``[out, in]`` is that shape.

        Raises:
            ValueError: the file holds another shape, or cannot be read.
        """

    def has(self, name: str) -> bool:
        """Whether the bound source holds this parameter or persistent buffer. Only buffers may be absent."""

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json``, and ``generation_config.json`` and the tokenizer's files if there are any."""


def check_finite(name: str, value: Tensor | Int4Weight) -> None:
    """Raises ValueError where a tensor that is taken over is not finite; ``quantize_matrix`` checks the others."""
    parts = value.tensors().items() if isinstance(value, Int4Weight) else [("it", value)]
    for part, tensor in parts:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} of the source is damaged: {part} must be finite; download it again")
