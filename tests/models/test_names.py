"""The names of tensors: tied, renamed, derived, missing and left over."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import tiny_config
from transformers import AutoModelForCausalLM, BertConfig

from mebp_triton.models.names import (
    check_complete,
    check_shape,
    current_names,
    enumerate_names,
    names_in,
    parameter_aliases,
    persistent_buffers,
    tensor_shapes,
    warn_unused,
)
from mebp_triton.models.skeleton import build_skeleton

HEAD, TABLE, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def skeleton(architecture: str = "llama", **changes: Any) -> Any:
    return build_skeleton(tiny_config(architecture, **changes), torch.float32)


def test_a_tied_table_has_both_its_names() -> None:
    aliases = parameter_aliases(skeleton())
    assert aliases[TABLE] == [TABLE, HEAD] and HEAD not in aliases and aliases[NORM] == [NORM]
    apart = parameter_aliases(skeleton(tie_word_embeddings=False))
    assert apart[TABLE] == [TABLE] and apart[HEAD] == [HEAD]


def test_each_name_of_a_parameter_leads_to_the_one_that_is_stored() -> None:
    assert names_in(skeleton(), {HEAD, NORM}) == {TABLE: HEAD, HEAD: HEAD, NORM: NORM}


def test_buffers_that_checkpoints_carry() -> None:
    model = skeleton()
    assert persistent_buffers(model) == []
    model.model.register_buffer("counts", torch.zeros(3))
    model.model.register_buffer("computed", torch.zeros(3), persistent=False)
    assert persistent_buffers(model) == ["model.counts"]
    shapes = tensor_shapes(model)
    assert shapes["model.counts"] == (3,) and shapes[HEAD] == shapes[TABLE] == (97, 48)
    assert "model.computed" not in shapes


def test_names_in_a_row() -> None:
    names = [f"n{number}" for number in range(5)]
    assert enumerate_names(names) == "n0, n1, n2 and 2 more" and enumerate_names(names, 1) == "n0 and 4 more"
    assert enumerate_names(names[:3]) == "n0, n1, n2" and enumerate_names(names[:1]) == "n0"


def test_what_a_checkpoint_lacks() -> None:
    check_complete("here", ["a", "b"], iter(["b", "c", "a"]))
    with pytest.raises(ValueError, match="^here lacks a, c, d and 1 more: give a complete checkpoint"):
        check_complete("here", ["a", "b", "c", "d", "e"], {"b": 1})


def test_what_the_model_has_no_place_for() -> None:
    model = skeleton()
    derived = ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.masked_bias", "h.0.attn.bias"]
    derived += ["gpt_neox.layers.0.attention.bias"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unused("here", model, derived)
        model._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
        warn_unused("here", model, ["mtp.head.weight"])
    with pytest.warns(UserWarning, match="^here: the model that its config describes has no a, b: left out$"):
        warn_unused("here", model, ["b", *derived, "mtp.head.weight", "a"])


def test_shapes_are_compared() -> None:
    check_shape("here", "w", [2, 3], torch.Size((2, 3)))
    with pytest.raises(ValueError, match=r"^here: w has shape \(2, 3\), the model wants \(3, 2\): .* belong together"):
        check_shape("here", "w", (2, 3), (3, 2))


def test_names_that_transformers_has_changed() -> None:
    """Old BERT checkpoints say gamma and beta; the table of such names is transformers' own."""
    pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 has no table of changed names")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(BertConfig(vocab_size=48, is_decoder=True, **sizes))
    norm = "bert.embeddings.LayerNorm"
    old = {f"{norm}.gamma": f"{norm}.weight", f"{norm}.beta": f"{norm}.bias", "bert.other": "bert.other"}
    assert current_names(model, old) == old
    # A name of today stays, though a pattern of older names has it: DeepSeek-V4's final norm, by that of its keys.
    layer = model.get_submodule(norm)
    layer.gamma = layer.weight
    del layer.weight
    assert current_names(model, [f"{norm}.gamma"]) == {f"{norm}.gamma": f"{norm}.gamma"}
