"""The tensors of a GGUF adapter: by llama.cpp's rule they are the adapter's, with rows where the file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_config
from torch import Tensor

from mebp_triton.convert.readers.gguf_layout import GgufLayout
from mebp_triton.convert.readers.merged_store import Delta
from mebp_triton.convert.writers.gguf_adapter import relative_rms, write_gguf_adapter
from mebp_triton.models.skeleton import Int4Site

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

QUERIES, DOWN = Int4Site("q", "linear", 48, 48), Int4Site("down", "linear", 48, 80)
NAMES = {"q": "blk.0.attn_q.weight", "down": "blk.0.ffn_down.weight"}


def delta(site: Int4Site, rank: int, scaling: float) -> Delta:
    draw = torch.Generator().manual_seed(rank)
    a, b = (
        torch.randn(shape, generator=draw).bfloat16().float()
        for shape in ((rank, site.in_features), (site.out_features, rank))
    )
    return Delta(a, b, scaling)


def write(target: Path, deltas: dict[Int4Site, Delta], **options: Any) -> float:
    layout = GgufLayout("llama", tiny_config("llama"), "here")
    parts = {site.name: {NAMES[site.name]: site.out_features} for site in deltas if site.name in NAMES}
    return write_gguf_adapter(target, layout, parts, deltas, **options)


def applied(path: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each matrix: ``alpha`` over the rank of B, or 1 for an alpha of 0, times ``B @ A``."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    parts = {tensor.name: torch.from_numpy(np.array(tensor.data, np.float32)) for tensor in reader.tensors}
    names = {name.rpartition(".lora_")[0] for name in parts}
    assert parts.keys() == {f"{name}.lora_{part}" for name in names for part in "ab"}
    return {
        name: (alpha / parts[f"{name}.lora_b"].shape[1] if alpha else 1.0)
        * (parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"])
        for name in names
    }


def rows_of_the_file(matrix: Tensor) -> Tensor:
    return matrix.view(4, 2, 6, -1).transpose(1, 2).reshape(matrix.shape)


@pytest.mark.parametrize("scalings", [(2.0, 2.0), (2.0, 0.25), (-0.5, 3.0), (0.0, 1.5), (0.0, 0.0)])
def test_every_scaling_and_rank_is_what_llama_cpp_computes(tmp_path: Path, scalings: tuple[float, float]) -> None:
    deltas = {QUERIES: delta(QUERIES, 4, scalings[0]), DOWN: delta(DOWN, 7, scalings[1])}
    assert write(tmp_path / "a.gguf", deltas) == 0
    found = applied(tmp_path / "a.gguf")
    for site, (a, b, scaling) in deltas.items():
        wanted = scaling * b @ a
        wanted = rows_of_the_file(wanted) if site is QUERIES else wanted
        assert torch.allclose(found.pop(NAMES[site.name]), wanted, rtol=1e-5, atol=1e-5)
    assert not found
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    stated = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    assert all(fields[key].contents() == value for key, value in stated.items())


def test_narrower_types_say_what_they_lose(tmp_path: Path) -> None:
    deltas = {DOWN: delta(DOWN, 4, 1.0)}
    assert write(tmp_path / "b.gguf", deltas, kind="BF16") == 0, "the values have 8 bits"
    finer = {DOWN: Delta(deltas[DOWN].a / 3, deltas[DOWN].b, 1.0)}
    assert 1e-5 < write(tmp_path / "h.gguf", finer, kind="F16") < 4e-4 < write(tmp_path / "c.gguf", finer, kind="BF16")
    with pytest.raises(ValueError, match="blk.0.ffn_down.weight.lora_a is too large for F16"):
        write(tmp_path / "o.gguf", {DOWN: Delta(deltas[DOWN].a * 1e6, deltas[DOWN].b, 1.0)}, kind="F16")
    assert not (tmp_path / "o.gguf").exists()


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    other = Int4Site("gate", "linear", 48, 48)
    with pytest.raises(ValueError, match="no matrix for gate in architecture 'llama': train without"):
        write(tmp_path / "a.gguf", {other: delta(other, 2, 1.0)})
    layout = GgufLayout("gpt2", tiny_config("gpt2"), "here")  # whose matrices are transposed
    with pytest.raises(ValueError, match="q: a GGUF file has blk.0.ffn_down.weight in a form that is not known"):
        write_gguf_adapter(tmp_path / "a.gguf", layout, {"q": {NAMES["down"]: 48}}, {QUERIES: delta(QUERIES, 2, 1.0)})
    one = Int4Site("q", "linear", 1, 48)
    write_gguf_adapter(tmp_path / "a.gguf", layout, {"q": {NAMES["down"]: 1}}, {one: delta(one, 2, 1.0)})


def test_nothing_differs_from_nothing() -> None:
    assert relative_rms(np.zeros(2), np.zeros(2)) == 0 and relative_rms(np.ones(2), np.full(2, 2.0)) == 0.5
