"""GGUF's names of a model's tensors and the places of their rows, as llama.cpp's converter has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import composite_config, tiny_config
from transformers import PreTrainedModel

from mebp_triton.convert.readers.gguf_architectures import ARCHITECTURES
from mebp_triton.convert.readers.gguf_layout import GgufLayout, architectures_of
from mebp_triton.models.skeleton import build_skeleton

pytest.importorskip("gguf", reason="the gguf extra is not installed")


def layout_of(kind: str, **changes: Any) -> tuple[GgufLayout, PreTrainedModel]:
    model = build_skeleton(tiny_config(kind, **changes), torch.float32)
    return GgufLayout(architectures_of(kind)[0], model.config, "here"), model


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What the converter does to Llama's queries and keys: halves of a head are interleaved."""
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


@pytest.mark.parametrize(("kind", "name"), [("llama", "llama"), ("mistral", "llama"), ("gemma3_text", "gemma3")])
def test_names_of_relatives_too(kind: str, name: str) -> None:
    layout, model = layout_of(kind)
    assert layout.arch == name
    names = layout.names(model)
    assert names["blk.1.attn_q.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert {"token_embd.weight", "output_norm.weight", "blk.2.ffn_down.weight"} <= names.keys()


def test_the_language_model_of_a_larger_one_has_the_names_that_it_has_alone() -> None:
    whole = build_skeleton(composite_config("mistral3"), torch.float32)
    layout, model = layout_of("mistral")
    names = layout.names(whole)
    assert names.keys() == layout.names(model).keys()
    assert names["blk.1.attn_q.weight"] == "model.language_model.layers.1.self_attn.q_proj.weight"


def test_rows_of_queries_and_keys_lie_as_the_converter_puts_them() -> None:
    layout, _ = layout_of("llama")
    for name, heads in (("attn_q", 4), ("attn_k", 2), ("attn_v", 0), ("ffn_up", 0)):
        rows = 12 * heads or 80
        order = layout.row_order(f"blk.0.{name}.weight", (rows, 48))
        file = permuted(torch.arange(rows), heads) if heads else torch.arange(rows)
        assert order is not None and torch.equal(file[order], torch.arange(rows)), name


def test_a_transposed_matrix_has_an_order_for_those_who_know() -> None:
    layout, _ = layout_of("gpt2")
    name = "blk.0.attn_output.weight"
    assert layout.row_order(name, (48, 48)) is None
    assert torch.equal(layout.row_order(name, (48, 48), transposed=True), torch.arange(48))
    assert layout.row_order("token_embd.weight", (97, 48), transposed=True) is None


def test_each_architecture_is_found_by_its_model_type() -> None:
    assert all(name in architectures_of(each.model_type) for name, each in ARCHITECTURES.items())
    assert architectures_of("mistral") == ("llama", "mistral3")
    with pytest.raises(ValueError, match="names the tensors of a olmo model is not known"):
        architectures_of("olmo")


@pytest.mark.parametrize(
    ("arch", "ignored", "applied"),
    [
        ("deepseek2", ("output", "blk.0.attn_q_a", "blk.12.attn_kv_a_mqa"), ("blk.0.attn_output", "blk.0.ffn_up")),
        ("gemma4", ("per_layer_model_proj",), ("blk.0.inp_gate", "blk.0.attn_q")),
        ("llama", (), ("output", "blk.0.attn_q")),
    ],
)
def test_matrices_whose_adapters_llama_cpp_does_not_apply(arch, ignored, applied) -> None:
    layout = GgufLayout(arch, layout_of("llama")[1].config, "here")
    assert not any(layout.applies_adapters(f"{name}.weight") for name in ignored)
    assert all(layout.applies_adapters(f"{name}.weight") for name in applied)
