"""Reads the parts of a model for text and images that a store leaves out, from the checkpoint it was made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.convert.readers import open_source
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.language_part import parts_left_out
from mebp_triton.models.names import persistent_buffers, tensor_shapes
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class OtherParts:
    """The tensors of the parts that are left out, by the names of the whole model; none for a language model alone.

    Args:
        store: the store.
        model: its model without weights, as ``build_skeleton`` makes it.

    Attributes:
        shapes: the shape of each tensor.

    Raises:
        ValueError: the checkpoint is not where it was, or not as it was.
    """

    def __init__(self, store: Store, model: Any) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        if not (parts := tuple(f"{path}." for path in parts_left_out(model))):
            return
        self.directory = Path("" if store.base is None else store.base.name_or_path)
        wanted = f"store {store.directory} has the language model of {type(model).__name__} alone"
        if store.base is None or not self.directory.is_dir():
            raise ValueError(
                f"{wanted}, and the checkpoint that it was made of, {store.base and store.base.name_or_path!r}, is not "
                f"there to take the rest from: put it back, or merge the adapter into the whole model by PEFT"
            )
        self.source = open_source(self.directory)
        if store.base.is_in(self.source.files) is False:
            raise ValueError(
                f"{wanted}, and the weights in {self.directory} are others than those that it was made of: put the "
                f"checkpoint back, or quantize the model again"
            )
        whole = build_skeleton(self.source.config, torch.float32, other_parts=True)
        self.source.bind(whole)
        shapes = tensor_shapes(whole)
        names = [name for name, _ in whole.named_parameters()]
        names += [name for name in persistent_buffers(whole) if self.source.has(name)]
        self.shapes = {name: shapes[name] for name in names if name.startswith(parts)}

    def read(self, name: str) -> Tensor:
        """The tensor ``name``: as the checkpoint has it, or decoded where that has codes."""
        value = self.source.read(name)
        return decode(value, torch.float32) if isinstance(value, Int4Weight) else value

    def save_companions(self, target: Path) -> None:
        """Copies the settings of the processor of images into ``target``."""
        for name in PROCESSORS if self.shapes else ():
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, target / name)
