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

from mebp_triton.convert.readers.gguf_layout import GgufLayout, Order
from mebp_triton.convert.readers.merged_store import Delta
from mebp_triton.models.skeleton import Int4Site

from .gguf_file import Planned, decode, encode, pair, write_gguf


def write_gguf_adapter(
    target: Path,
    layout: GgufLayout,
    parts: Mapping[str, Mapping[str, int]],
    deltas: Mapping[Int4Site, Delta],
    kind: str = "F32",
) -> float:
    """Writes an adapter.

    Args:
        target: the file.
        layout: the names and orders of the base model's files.
        parts: the tensors that each module's matrix is in a file, with their rows, by the paths of the modules.
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
        if site.name not in parts:
            raise ValueError(f"llama.cpp has no matrix for {site.name} in architecture {layout.arch!r}: train without")
        if ignored := [name for name in parts[site.name] if not layout.applies_adapters(name)]:
            raise ValueError(
                f"llama.cpp does not apply adapters to {ignored[0]} ({site.name}) in architecture {layout.arch!r}: "
                "train without, or export a merged model by --to gguf"
            )
        for name, places in places_in_file(layout, site, parts[site.name]).items():
            tensors[f"{name}.lora_a"] = a[:, places.columns].numpy()
            tensors[f"{name}.lora_b"] = (b[places.rows] * (scaling * a.shape[0] / alpha)).numpy()
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


def places_in_file(layout: GgufLayout, site: Int4Site, parts: Mapping[str, int]) -> dict[str, Order]:
    """The row and the column of a module's matrix that each one of a file's tensors is, by the tensors' names.

    Args:
        layout: the layout of the file.
        site: the module.
        parts: the tensors that its matrix is there, with their rows, in order.

    Raises:
        ValueError: the file has another form of the matrix.
    """
    if site.out_features == 1:  # a gate of experts, which may be a vector in the file
        return {name: Order(torch.arange(1), torch.arange(site.in_features)) for name in parts}
    shapes = {name: (rows, site.in_features) for name, rows in parts.items()}
    rows = {name: layout.row_order(name, shape, site.transposed) for name, shape in shapes.items()}
    orders = {name: layout.order(name, shape, site.transposed) for name, shape in shapes.items()}
    known = {name: order for name, order in rows.items() if order is not None}
    if len(known) < len(parts):
        raise ValueError(f"{site.name}: a GGUF file has {', '.join(parts)} in a form that is not known: train without")
    places = layout.join_rows(next(iter(parts)), list(known.values())).argsort().split(list(parts.values()))
    columns = (order.columns.argsort() for order in orders.values() if order is not None)
    return {name: Order(*pair) for name, pair in zip(parts, zip(places, columns, strict=True), strict=True)}


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    """The root of the mean square of what differs, over that of ``wanted``; 0 where nothing is wanted."""
    size = float(np.square(wanted, dtype=np.float64).sum())
    return float(np.square(got.astype(np.float64) - wanted).sum() / size) ** 0.5 if size else 0.0
