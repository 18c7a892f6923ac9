"""A store of random weights at a configuration's shapes, written block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton import files
from mebp_triton.blocks import find_blocks
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.skeleton import Int4Site, build_skeleton, float_names, int4_sites
from mebp_triton.stores.format import SHARED, StoreWriter, block_file

# Root mean square of code - 8 for codes 0..15.
CODE_RMS = 4.64


def write_random_store(config: Any, target: Path, device: torch.device) -> None:
    """Entries as large as an initialised model's: activations stay finite through all blocks."""
    model = build_skeleton(config, torch.float32)
    path, stack = find_blocks(model)
    sites, tied = int4_sites(model)
    floats = float_names(model, sites)
    parameters = dict(model.named_parameters())
    done: set[str] = set()

    def write(writer: StoreWriter, file: str, prefix: str) -> None:
        mine = [site for site in sites if site.name.startswith(prefix) and site.name not in done]
        kept = [name for name in floats if name.startswith(prefix) and name not in done]
        matrices = {site.name: (_matrix(site, config.initializer_range, device), 0.0) for site in mine}
        writer.write_file(file, matrices, {name: _float(name, parameters[name]) for name in kept})
        done.update(matrices, kept)

    with files.atomic_directory(target) as directory:
        config.save_pretrained(directory)
        writer = StoreWriter(directory, "random weights", tied)
        for index in range(len(stack)):
            write(writer, block_file(index), f"{path}.{index}.")
        write(writer, SHARED, "")
        writer.finish()


def _matrix(site: Int4Site, rms: float, device: torch.device) -> Int4Weight:
    n, k = site.out_features, site.in_features
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = torch.full((-(-k // 64), n), rms / CODE_RMS, dtype=torch.float16, device=device)
    return Int4Weight.from_codes(codes, scales, 64).to("cpu")


def _float(name: str, parameter: Tensor) -> Tensor:
    """Norms are ones, biases are zeros."""
    make = torch.zeros if name.endswith("bias") else torch.ones
    return make(parameter.shape, dtype=torch.float32)
