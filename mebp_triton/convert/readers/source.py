"""What a reader of a foreign checkpoint offers."""

from __future__ import annotations

import os
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mebp_triton.kernels.layout import Int4Weight


class Source(Protocol):
    """A checkpoint on disk.

    Attributes:
        config: what ``AutoModelForCausalLM.from_config`` needs; ``architectures`` set, nothing quantised about it.
        description: the format and the file's own name, for provenance.
    """

    config: PretrainedConfig
    description: str

    def bind(self, model: PreTrainedModel) -> None:
        """Finds every parameter of ``model`` (on the meta device is enough) in the files.

        Raises:
            ValueError: some parameters are not there, or cannot be used.
        """

    def read(self, name: str) -> Tensor | Int4Weight:
        """One parameter of the bound model, by its name in ``model.named_parameters()``, or a buffer it has.

        Returns:
            A float tensor of the parameter's own shape, or an ``Int4Weight`` whose logical ``[out, in]`` is that shape.

        Raises:
            ValueError: the file holds another shape, or cannot be read.
        """

    def has(self, name: str) -> bool:
        """Whether the bound source holds this parameter or persistent buffer. Only buffers may be absent."""

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json``, ``generation_config.json`` and the tokenizer's files, as far as there are any."""
