"""GGUF architectures that are mixtures of experts."""

from __future__ import annotations

from typing import Any

from .gguf_keys import Architecture, Rule, Set, Settings, Unused, equal, one_of, same_as
from .gguf_rules import (
    GRANITE,
    GRANITE_DERIVED,
    GRANITE_NAMES,
    HALVES,
    LLAMA,
    MIXTURE,
    NEUTRAL,
    QWEN2,
    SHAPE,
    SIGMOID,
    SOFTMAX,
    count,
    layer_types,
    period,
)
from .gguf_undo import transposed


def _sigmoid(value: Any) -> str:
    if value != 2:
        raise ValueError("wanted 2, the sigmoid")
    return "sigmoid"


def _queries_width(settings: Settings) -> int:
    """The part of a query's head without RoPE.

    A file that keeps latents states the widths of heads under other keys, and has the latents' under the usual ones.
    """
    rope, latent = int(settings["qk_rope_head_dim"]), int(settings["kv_lora_rank"])
    if not settings["_key_length_mla"]:
        return int(settings["_key_length"]) - rope
    for key, wanted in (("key_length", latent + rope), ("value_length", latent)):
        if settings[f"_{key}"] != wanted:
            raise ValueError(f"attention.{key} is {settings[f'_{key}']}, wanted {wanted} beside latents")
    return int(settings["_key_length_mla"]) - rope


def _small(value: Any) -> float:
    """The epsilon of norms. Those of latents have 1e-6 in transformers, whatever the others have."""
    if value > 1e-5:
        raise ValueError("wanted at most 1e-5")
    return float(value)


DEEPSEEK2: dict[str, Rule] = (
    SHAPE
    | NEUTRAL
    | {
        "attention.layer_norm_rms_epsilon": Set("rms_norm_eps", read=_small),
        "attention.head_count_kv": Unused("latents are the keys and values of all heads"),
        "attention.key_length": Set("_key_length", 0),
        "attention.value_length": Set("_value_length", 0),
        "attention.key_length_mla": Set("_key_length_mla", 0),
        "attention.value_length_mla": Set("_value_length_mla", 0),
        "attention.q_lora_rank": Set("q_lora_rank", None, count),
        "attention.kv_lora_rank": Set("kv_lora_rank", read=count),
        "attention.scale": one_of(0),
        "rope.dimension_count": Set("qk_rope_head_dim", read=count),
        "leading_dense_block_count": Set("first_k_dense_replace", 0),
        "expert_count": Set("n_routed_experts", read=count),
        "expert_used_count": Set("num_experts_per_tok", read=count),
        "expert_shared_count": Set("n_shared_experts", read=count),
        "expert_feed_forward_length": Set("moe_intermediate_size", read=count),
        "expert_weights_scale": Set("routed_scaling_factor", 1.0, lambda value: value or 1.0),
        "expert_weights_norm": Set("norm_topk_prob", False),
        "expert_group_count": Set("n_group", 1, lambda value: value or 1),
        "expert_group_used_count": Set("topk_group", 1, lambda value: value or 1),
        "expert_gating_func": Set("_gate", SOFTMAX),
    }
)


def _deepseek(settings: Settings) -> str:
    """DeepSeek-V3's router has a sigmoid, and V2's a softmax, without groups or weights that sum to one here."""
    if settings["_gate"] == SIGMOID:
        return "deepseek_v3"
    if settings["_gate"] != SOFTMAX:
        raise ValueError(f"expert_gating_func is {settings['_gate']}, wanted {SOFTMAX} or {SIGMOID}")
    for name, key, plain in (("n_group", "expert_group_count", 1), ("norm_topk_prob", "expert_weights_norm", False)):
        if settings[name] != plain:
            raise ValueError(f"{key} is {settings[name]}, wanted {plain} beside a softmax")
    return "deepseek_v2"


MIXTURES: dict[str, Architecture] = {
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
    "minimax-m2": Architecture(
        "minimax_m2",
        LLAMA
        | MIXTURE
        | {
            "expert_count": Set("num_local_experts", read=count),
            "expert_feed_forward_length": equal("intermediate_size"),
            "expert_gating_func": Set("scoring_func", read=_sigmoid),
        },
        rope="partial",
        names={"mlp.e_score_correction_bias": ("exp_probs_b.bias",)},
    ),
    "granitemoe": Architecture(
        "granitemoeshared",
        QWEN2
        | GRANITE
        | {
            "rope.scaling.finetuned": one_of(True),
            "expert_count": Set("num_local_experts", read=count),
            "expert_used_count": Set("num_experts_per_tok", read=count),
            "expert_feed_forward_length": equal("intermediate_size"),
            "expert_shared_feed_forward_length": Set("shared_intermediate_size", 0),
        },
        tensors={"attention_bias": "attn_q.bias"},
        derived=GRANITE_DERIVED,
        undo=HALVES,
        names=GRANITE_NAMES,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        LLAMA
        | {
            "feed_forward_length": Unused("all layers are mixtures"),
            "attention.sliding_window": Set("sliding_window", 0),
            "attention.sliding_window_pattern": Set("sliding_window_pattern", 2, period, each_layer=True),
            "expert_count": Set("num_local_experts", read=count),
            "expert_used_count": Set("num_experts_per_tok", read=count),
            "expert_feed_forward_length": Set("intermediate_size", read=count),
            "expert_gating_func": one_of(3),
        },
        # Its config in transformers would have YaRN where none is stated.
        fixed={"attention_bias": True, "rope_scaling": {"rope_type": "default"}},
        derived={"layer_types": layer_types},
        undo={"_exps.weight": transposed},
        names={
            "experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
            "experts.down_proj_bias": ("ffn_down_exps.bias",),
        },
        interleaved=True,
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        DEEPSEEK2,
        scaled=frozenset({"yarn"}),
        yarn_multiplier=10.0,
        fixed={"attention_bias": False},
        derived={
            "head_dim": same_as("qk_rope_head_dim"),
            "qk_nope_head_dim": _queries_width,
            "v_head_dim": lambda s: s["_value_length_mla"] or s["_value_length"],
            "num_key_value_heads": same_as("num_attention_heads"),
            "model_type": _deepseek,
        },
        undo={".attn_k_b.weight": transposed},
        adapterless=frozenset(
            f"{name}.weight" for name in ("output", "attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b")
        ),
        names={
            "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",),
            "self_attn.kv_b_proj.weight": ("attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"),
        },
    ),
}
