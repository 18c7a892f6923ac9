"""Rules that several GGUF architectures have in common; ``gguf_architectures.py`` has the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .gguf_header import DOWNLOAD
from .gguf_keys import NOT_HERE, Only, Rule, Set, Settings, Unused, head_size, one_of, same_as, width_of_head
from .gguf_undo import Undo, halves_of, minus_one


def count(value: Any) -> int:
    if value < 1 or value != int(value):
        raise ValueError("wanted a whole number, 1 or more")
    return int(value)


def _plain_scale(value: Any, settings: Settings) -> bool:
    return value == 0 or math.isclose(value, width_of_head(settings) ** -0.5, rel_tol=1e-5)


SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of what makes an expert's weight of its score
HEAD_OF_ANY_WIDTH: dict[str, Rule] = {"attention.key_length": Set("head_dim", head_size)}
HEAD_OF_ONE_WIDTH: dict[str, Rule] = {
    "attention.key_length": Only(lambda value, s: value == head_size(s), "the hidden size divided by the heads")
}
# What every model here has, and what none has: a neutral value is let through, any other names a function that the
# modelling code does not have.
SHAPE: dict[str, Rule] = {
    "context_length": Set("max_position_embeddings", read=count),
    "embedding_length": Set("hidden_size", read=count),
    "block_count": Set("num_hidden_layers", read=count),
    "feed_forward_length": Set("intermediate_size", read=count),
    "attention.head_count": Set("num_attention_heads", read=count),
    "attention.head_count_kv": Set("num_key_value_heads", same_as("num_attention_heads"), count),
}
NEUTRAL: dict[str, Rule] = {
    "attention.value_length": Only(lambda value, s: value == width_of_head(s), "the width of a head"),
    "attention.causal": one_of(True),
    "attention.scale": Only(_plain_scale, "one divided by the root of a head's width"),
    "attention.clamp_kqv": one_of(0),
    "attention.max_alibi_bias": one_of(0),
    "attention.sliding_window": Only(
        lambda value, s: value == 0 or value >= s["max_position_embeddings"], "0 or at least the context length"
    ),
    "attention.temperature_length": one_of(0),
    "attention.temperature_scale": one_of(0),
    "attention.shared_kv_layers": one_of(0),
    "attn_logit_softcapping": one_of(0),
    "final_logit_softcapping": one_of(0),
    "logit_scale": one_of(0, 1),
    "embedding_scale": one_of(0, 1),
    "residual_scale": one_of(0, 1),
    "expert_count": one_of(0),
    "expert_used_count": one_of(0),
    "expert_shared_count": one_of(0),
    "expert_group_count": one_of(0, 1),
    "expert_group_used_count": one_of(0, 1),
    "expert_weights_scale": one_of(0, 1),
    "leading_dense_block_count": one_of(0),
    "nextn_predict_layers": one_of(0),
    "vocab_size": Unused("the vocabulary is as long as the list of tokens"),
    "tensor_data_layout": Unused("a remark of old converters"),
    "pooling_type": Unused("for embeddings of whole texts"),
}
RMS: dict[str, Rule] = {"attention.layer_norm_rms_epsilon": Set("rms_norm_eps")}
LLAMA = SHAPE | HEAD_OF_ANY_WIDTH | RMS | NEUTRAL
QWEN2 = SHAPE | HEAD_OF_ONE_WIDTH | RMS | NEUTRAL
MIXTURE: dict[str, Rule] = {
    "expert_count": Set("num_experts", read=count),
    "expert_used_count": Set("num_experts_per_tok", read=count),
    "expert_feed_forward_length": Set(
        "moe_intermediate_size", lambda s: s["intermediate_size"] // s["num_experts_per_tok"]
    ),
    "expert_gating_func": one_of(SOFTMAX),
}


# llama.cpp's RoPE turns neighbouring rows of these architectures; their models in transformers turn halves of a head.
HALVES: dict[str, Undo] = {
    f".attn_{name}.{part}": halves_of(heads)
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for part in ("weight", "bias")
}
ADDS_ONE: dict[str, Undo] = {"norm.weight": minus_one}

# Factors of Granite by which sums and scores are multiplied, and logits divided. A zero is none.
GRANITE: dict[str, Rule] = {
    "attention.scale": Set("attention_multiplier", 0.0),
    "embedding_scale": Set("embedding_multiplier", 1.0, lambda value: value or 1.0),
    "residual_scale": Set("residual_multiplier", 1.0, lambda value: value or 1.0),
    "logit_scale": Set("logits_scaling"),
}
GRANITE_DERIVED: dict[str, Callable[[Settings], Any]] = {
    "attention_multiplier": lambda s: s["attention_multiplier"] or width_of_head(s) ** -0.5
}
# Granite's names of a router, and of experts that are shared.
GRANITE_NAMES = {
    "block_sparse_moe.router.weight": ("ffn_gate_inp.weight",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}


def period(value: Any) -> int:
    """The period of sliding layers: every n-th layer attends to all tokens. A list has it per layer."""
    if not isinstance(value, list):
        return count(value)
    period = value.index(False) + 1 if False in value else len(value) + 1
    if value != [bool((layer + 1) % period) for layer in range(len(value))]:
        raise ValueError("layers slide without a period")
    return period


def layer_types(settings: Settings) -> list[str]:
    period = settings["sliding_window_pattern"] if settings["sliding_window"] else 1
    slides = [bool((layer + 1) % period) for layer in range(settings["num_hidden_layers"])]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def key_heads(settings: Settings) -> list[int]:
    """The number of key heads of each layer, 0 where it has no attention."""
    heads = settings["_key_heads"]
    heads = heads if isinstance(heads, list) else [heads] * settings["num_hidden_layers"]
    if len(heads) != settings["num_hidden_layers"] or len({*heads} - {0}) != 1:
        raise ValueError(f"attention.head_count_kv is {heads!r:.100}, {NOT_HERE}")
    return heads


KEY_HEADS: dict[str, Rule] = {"attention.head_count_kv": Set("_key_heads", each_layer=True)}


def some_layers(name: str, key: str) -> Callable[[Settings], int]:
    """The setting ``name``, which counts some of the layers and not all, and has the value of ``key``."""

    def number(settings: Settings) -> int:
        value, layers = settings[name], settings["num_hidden_layers"]
        if value != int(value) or not 0 <= value < layers:
            raise ValueError(f"{key} is {value!r:.100} of {layers} layers; {DOWNLOAD}")
        return int(value)

    return number
