"""The table of GGUF architectures that are read: what each key of their files means for the model's config.

The keys are those that llama.cpp's loader reads for the architecture, and those of others that a converter may write.
Keys of RoPE are in ``gguf_rope.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import __version__

from .gguf_keys import (
    NOT_HERE,
    Architecture,
    Only,
    Rule,
    Set,
    Settings,
    Unused,
    equal,
    head_size,
    one_of,
    same_as,
    width_of_head,
)
from .gguf_undo import by_heads, halves_of, log_of_negative, minus_one, transposed


def _count(value: Any) -> int:
    if value < 1 or value != int(value):
        raise ValueError("wanted a whole number, 1 or more")
    return int(value)


def _plain_scale(value: Any, settings: Settings) -> bool:
    return value == 0 or math.isclose(value, width_of_head(settings) ** -0.5, rel_tol=1e-5)


HEAD_OF_ANY_WIDTH: dict[str, Rule] = {"attention.key_length": Set("head_dim", head_size)}
HEAD_OF_ONE_WIDTH: dict[str, Rule] = {
    "attention.key_length": Only(lambda value, s: value == head_size(s), "the hidden size divided by the heads")
}
# What every model here has, and what none has: a neutral value is let through, any other names a function that the
# modelling code does not have.
SHAPE: dict[str, Rule] = {
    "context_length": Set("max_position_embeddings", read=_count),
    "embedding_length": Set("hidden_size", read=_count),
    "block_count": Set("num_hidden_layers", read=_count),
    "feed_forward_length": Set("intermediate_size", read=_count),
    "attention.head_count": Set("num_attention_heads", read=_count),
    "attention.head_count_kv": Set("num_key_value_heads", same_as("num_attention_heads"), _count),
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
    "expert_count": Set("num_experts", read=_count),
    "expert_used_count": Set("num_experts_per_tok", read=_count),
    "expert_feed_forward_length": Set(
        "moe_intermediate_size", lambda s: s["intermediate_size"] // s["num_experts_per_tok"]
    ),
    "expert_gating_func": one_of(1),  # softmax
}


def _period(value: Any) -> int:
    """The period of sliding layers: every n-th layer attends to all tokens. A list has it per layer."""
    if not isinstance(value, list):
        return _count(value)
    period = value.index(False) + 1 if False in value else len(value) + 1
    if value != [bool((layer + 1) % period) for layer in range(len(value))]:
        raise ValueError("layers slide without a period")
    return period


def _layer_types(settings: Settings) -> list[str]:
    period = settings["sliding_window_pattern"] if settings["sliding_window"] else 1
    slides = [bool((layer + 1) % period) for layer in range(settings["num_hidden_layers"])]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _gemma(layers_of_27b: int) -> Callable[[Settings], int]:
    """The number that scales Gemma's queries. Its largest model alone has another, and no key says so."""
    return lambda s: head_size(s) if s["num_hidden_layers"] == layers_of_27b else width_of_head(s)


def _cap(value: Any) -> float | None:
    return float(value) or None


def _key_heads(settings: Settings) -> list[int]:
    heads = settings["_key_heads"]
    heads = heads if isinstance(heads, list) else [heads] * settings["num_hidden_layers"]
    if len(heads) != settings["num_hidden_layers"] or len({*heads} - {0}) != 1:
        raise ValueError(f"lfm2.attention.head_count_kv is {heads!r:.100}, {NOT_HERE}")
    return heads


def _lfm2_layers(settings: Settings) -> list[str]:
    return ["full_attention" if heads else "conv" for heads in _key_heads(settings)]


def _sigmoid(value: Any) -> str:
    if value != 2:
        raise ValueError("wanted 2, the sigmoid")
    return "sigmoid"


def _one_key_head(value: Any) -> int:
    if value != 1:
        raise ValueError("only with one key head is the fused matrix ordered by queries, keys, values")
    return 1


# llama.cpp's RoPE turns neighbouring rows of these architectures; their models in transformers turn halves of a head.
HALVES = {
    f".attn_{name}.{part}": halves_of(heads)
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for part in ("weight", "bias")
}
ADDS_ONE = {"norm.weight": minus_one}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama",
        LLAMA,
        factors=frozenset({"freqs", "long"}),
        tensors={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        undo=HALVES,
    ),
    "qwen2": Architecture("qwen2", QWEN2, fixed={"use_sliding_window": False}),
    "qwen3": Architecture(
        "qwen3", LLAMA, fixed={"use_sliding_window": False}, tensors={"attention_bias": "attn_q.bias"}
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        QWEN2
        | MIXTURE
        | {
            "expert_shared_feed_forward_length": Set("shared_expert_intermediate_size", same_as("intermediate_size")),
            "expert_shared_count": one_of(0, 1),
            "expert_weights_norm": one_of(False),
        },
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        LLAMA | MIXTURE | {"expert_weights_norm": one_of(True)},
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
    ),
    "phi3": Architecture(
        "phi3",
        # llama.cpp says that it leaves this window out; the model that was converted has it.
        QWEN2 | {"attention.sliding_window": Set("sliding_window", None, lambda value: value or None)},
        rope="partial",
        scaled=False,
        factors=frozenset({"long"}),
    ),
    "gemma2": Architecture(
        "gemma2",
        LLAMA
        | {
            "attention.sliding_window": Set("sliding_window", 4096),
            "attention.sliding_window_pattern": Set("sliding_window_pattern", 2, _period, each_layer=True),
            "attention.scale": one_of(0),
            "attn_logit_softcapping": Set("attn_logit_softcapping", 50.0, _cap),
            "final_logit_softcapping": Set("final_logit_softcapping", 30.0, _cap),
        },
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        derived={"query_pre_attn_scalar": _gemma(46), "layer_types": _layer_types},
        undo=ADDS_ONE,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        LLAMA
        | {
            "attention.sliding_window": Set("sliding_window", 0),
            "attention.sliding_window_pattern": Set("sliding_window_pattern", 6, _period, each_layer=True),
            "attention.scale": one_of(0),
            "final_logit_softcapping": Set("final_logit_softcapping", None, _cap),
        },
        rope="local",
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        derived={
            "query_pre_attn_scalar": _gemma(62),
            "layer_types": _layer_types,
            # transformers makes a mask for sliding layers even where there are none.
            "sliding_window": lambda s: s["sliding_window"] or s["max_position_embeddings"],
        },
        undo=ADDS_ONE,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        SHAPE | HEAD_OF_ONE_WIDTH | {"attention.layer_norm_epsilon": Set("norm_epsilon")} | NEUTRAL,
        fixed={"use_bias": True},
    ),
    "stablelm": Architecture(
        "stablelm",
        SHAPE
        | HEAD_OF_ONE_WIDTH
        | {
            "attention.layer_norm_epsilon": Set("layer_norm_eps"),
            "use_parallel_residual": Unused("llama.cpp goes by the norms of a block"),
        }
        | NEUTRAL,
        rope="partial",
        tensors={
            "use_qkv_bias": "attn_q.bias",
            "use_parallel_residual": "!ffn_norm.weight",
        },
    ),
    "nemotron": Architecture(
        "nemotron",
        SHAPE | HEAD_OF_ANY_WIDTH | {"attention.layer_norm_epsilon": Set("norm_eps")} | NEUTRAL,
        rope="partial",
        scaled=int(__version__.partition(".")[0]) > 4,  # transformers 4 has a setting for it, and leaves it out
        tensors={"attention_bias": "attn_output.bias", "mlp_bias": "ffn_up.bias"},
        undo=ADDS_ONE,
    ),
    "falcon": Architecture(
        "falcon",
        SHAPE
        | HEAD_OF_ONE_WIDTH
        | {
            "feed_forward_length": Set("ffn_hidden_size"),
            "attention.head_count_kv": Set("num_kv_heads", read=_one_key_head),
            "attention.layer_norm_epsilon": Set("layer_norm_epsilon"),
        }
        | NEUTRAL,
        fixed={"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
    ),
    "bloom": Architecture(
        "bloom",
        SHAPE
        | HEAD_OF_ONE_WIDTH
        | {
            "context_length": Unused("alibi has no last position"),
            "feed_forward_length": Only(lambda value, s: value == 4 * s["hidden_size"], "four times the hidden size"),
            "attention.head_count_kv": equal("num_attention_heads"),
            "attention.layer_norm_epsilon": Set("layer_norm_epsilon"),
        }
        | NEUTRAL
        | {"attention.max_alibi_bias": one_of(8), "attention.sliding_window": one_of(0)},
        rope=None,
        undo={"attn_qkv.weight": by_heads, "attn_qkv.bias": by_heads},
    ),
    "gpt2": Architecture(
        "gpt2",
        SHAPE
        | HEAD_OF_ONE_WIDTH
        | {
            "context_length": Set("n_positions"),
            "feed_forward_length": Set("n_inner"),
            "attention.head_count_kv": equal("num_attention_heads"),
            "attention.layer_norm_epsilon": Set("layer_norm_epsilon"),
        }
        | NEUTRAL
        | {"attention.sliding_window": one_of(0)},
        rope=None,
        fixed={"activation_function": "gelu_new"},
        undo={f".{name}.weight": transposed for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
    ),
    "mamba": Architecture(
        "mamba",
        {
            "context_length": Unused("a state has no positions"),
            "embedding_length": Set("hidden_size", read=_count),
            "block_count": Set("num_hidden_layers", read=_count),
            "feed_forward_length": one_of(0),
            "attention.head_count": one_of(0),
            "attention.head_count_kv": one_of(0),
            "attention.layer_norm_rms_epsilon": Set("layer_norm_epsilon"),
            "ssm.conv_kernel": Set("conv_kernel", read=_count),
            "ssm.inner_size": Set("intermediate_size", read=_count),
            "ssm.state_size": Set("state_size", read=_count),
            "ssm.time_step_rank": Set("time_step_rank", read=_count),
            "ssm.dt_b_c_rms": one_of(False),
            "vocab_size": NEUTRAL["vocab_size"],
        },
        rope=None,
        fixed={"use_bias": False, "use_conv_bias": True},
        derived={"expand": lambda s: s["intermediate_size"] // s["hidden_size"]},
        undo={"ssm_a": log_of_negative},
    ),
    "lfm2": Architecture(
        "lfm2",
        LLAMA
        | {
            "attention.key_length": HEAD_OF_ONE_WIDTH["attention.key_length"],
            # No key heads: a convolution in place of attention.
            "attention.head_count_kv": Set("_key_heads", each_layer=True),
            "attention.layer_norm_rms_epsilon": Set("norm_eps"),
            "shortconv.l_cache": Set("conv_L_cache"),
        },
        fixed={"conv_bias": False, "block_auto_adjust_ff_dim": False},
        derived={"num_key_value_heads": lambda s: max(_key_heads(s)), "layer_types": _lfm2_layers},
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        LLAMA
        | MIXTURE
        | {
            "expert_count": Set("num_local_experts", read=_count),
            "expert_feed_forward_length": equal("intermediate_size"),
            "expert_gating_func": Set("scoring_func", read=_sigmoid),
        },
        rope="partial",
        names={"mlp.e_score_correction_bias": ("exp_probs_b.bias",)},
    ),
}
