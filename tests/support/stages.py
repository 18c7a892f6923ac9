"""A model's blocks in arenas, as on a device that is not the CPU."""

from __future__ import annotations

from typing import Any

import torch

from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.store import placement
from mebp_triton.store.arena import Stager
from mebp_triton.store.manifest import block_file


def block_modules(model: Any, index: int) -> dict[str, Int4Module]:
    """The int4 modules of block ``index``, by their names in the store."""
    block = model.mebp.engine.blocks[index]
    prefix = next(name for name, module in model.named_modules() if module is block)
    return {f"{prefix}.{name}": m for name, m in block.named_modules() if isinstance(m, Int4Module)}


def staged(model: Any, residency: Any) -> Stager:
    """Puts the weights of the blocks into arenas on the CPU, from where ``residency`` says."""
    device, engine, store = torch.device("cpu"), model.mebp.engine, model.mebp.store
    files = [block_file(index) for index in range(len(engine.blocks))]
    stager = Stager(device, engine.waiting, max(store.files[file].data().numel() for file in files))
    engine.pages = [
        placement.place_weights(store, file, block_modules(model, index), residency, device, stager, engine.waiting)
        for index, file in enumerate(files)
    ]
    return stager
