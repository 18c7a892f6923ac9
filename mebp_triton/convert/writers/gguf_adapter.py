"""Writes an adapter as llama.cpp loads it: ``--lora FILE``, or ``ADAPTER FILE`` of Ollama.

llama.cpp multiplies ``B @ A`` of every matrix by one ``alpha`` over the rank of its B, so what is scaled otherwise is
scaled in B. Format: ``llama-adapter.cpp`` of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mebp_triton.convert.readers.gguf_layout import GgufLayout
from mebp_triton.convert.readers.merged_store import Delta
from mebp_triton.models.skeleton import Int4Site

from .gguf_file import Planned, decode, encode, pair, write_gguf


def write_gguf_adapter(
    target: Path,
    layout: GgufLayout,
    names: Mapping[str, str],
    deltas: Mapping[Int4Site, Delta],
    kind: str = "F32",
) -> float:
    """Writes an adapter.

    Args:
        target: the file.
        layout: the names and orders of the base model's files.
        names: GGUF's names of the base model's matrices, by the paths of the modules.
        deltas: what the adapter adds to each module.
        kind: "F32", "F16" or "BF16".

    Returns:
        The largest relative RMS error of a tensor; 0 for F32.

    Raises:
        ValueError: llama.cpp would not apply one of them.
    """
    alphas = Counter(delta.scaling * delta.a.shape[0] for delta in deltas.values() if delta.scaling)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0  # 0 means 1 to llama.cpp
    tensors: dict[str, np.ndarray] = {}
    for site, (a, b, scaling) in deltas.items():
        name = names.get(site.name)
        if name is None:
            raise ValueError(f"llama.cpp has no matrix for {site.name} in architecture {layout.arch!r}: train without")
        order = rows_in_file(layout, site, name)
        placed = torch.empty_like(b)
        placed[order] = b * (scaling * a.shape[0] / alpha)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a.numpy(), placed.numpy()
    data = {name: encode(np.ascontiguousarray(values), kind, name) for name, values in tensors.items()}
    error = max(relative_rms(decode(data[name], kind), values) for name, values in tensors.items())
    pairs = {"general.architecture": layout.arch, "general.type": "adapter", "adapter.type": "lora"}
    planned = [Planned(name, kind, values.shape) for name, values in tensors.items()]
    write_gguf(
        target,
        [pair(*item) for item in (pairs | {"adapter.lora.alpha": float(alpha)}).items()],
        planned,
        lambda name: [data[name]],
    )
    return error


def rows_in_file(layout: GgufLayout, site: Int4Site, name: str) -> Tensor:
    """The row of the matrix ``name`` in a file that each row of a module's comes from; see ``GgufLayout.row_order``."""
    shape = site.out_features, site.in_features
    # A matrix of one row (a gate of experts) may be a vector in the file; its row has no other place to be.
    order = torch.arange(1) if shape[0] == 1 else layout.row_order(name, shape, site.transposed)
    if order is None:
        raise ValueError(f"{site.name}: a GGUF file has {name} in a form that is not known: train without")
    return order


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    """The root of the mean square of what differs, over that of ``wanted``; 0 where nothing is wanted."""
    size = float(np.square(wanted, dtype=np.float64).sum())
    return float(np.square(got.astype(np.float64) - wanted).sum() / size) ** 0.5 if size else 0.0
