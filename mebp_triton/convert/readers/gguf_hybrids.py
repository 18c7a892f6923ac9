"""GGUF architectures whose layers are of several kinds: attention, convolutions, recurrent states."""

from __future__ import annotations

from typing import Any

from .gguf_keys import (
    NOT_HERE,
    Architecture,
    Only,
    Rule,
    Set,
    Settings,
    Unused,
    equal,
    one_of,
    same_as,
)
from .gguf_rules import (
    GRANITE,
    GRANITE_DERIVED,
    GRANITE_NAMES,
    HALVES,
    HEAD_OF_ONE_WIDTH,
    KEY_HEADS,
    LLAMA,
    NEUTRAL,
    QWEN2,
    SIGMOID,
    SOFTMAX,
    count,
    key_heads,
    some_layers,
)
from .gguf_undo import (
    Undo,
    by_key_heads,
    columns_of_value_heads,
    log_of_negative,
    minus_one,
    then,
    value_heads,
    value_heads_behind_keys,
)

LFM2_LAYERS = {True: "full_attention", False: "conv"}
GRANITE_LAYERS = {True: "attention", False: "mamba"}


def _kinds(names: dict[bool, str]) -> Any:
    """The kinds of the layers: attention where there are key heads."""
    return lambda settings: [names[heads > 0] for heads in key_heads(settings)]


def _qwen_layers(settings: Settings) -> list[str]:
    """The kinds of the layers: each is stated, or every n-th has attention."""
    stated, interval, layers = settings["_recurrent"], settings["_interval"], settings["num_hidden_layers"]
    if stated is not None and not isinstance(stated, list):
        raise ValueError(f"attention.recurrent_layers is {stated!r:.100}, {NOT_HERE}")
    recurrent = stated or [bool((layer + 1) % interval) for layer in range(layers)]
    return ["linear_attention" if each else "full_attention" for each in recurrent[:layers]]


LFM2: dict[str, Rule] = (
    LLAMA
    | KEY_HEADS  # none: a convolution in place of attention
    | {
        "attention.key_length": HEAD_OF_ONE_WIDTH["attention.key_length"],
        "attention.layer_norm_rms_epsilon": Set("norm_eps"),
        "shortconv.l_cache": Set("conv_L_cache"),
    }
)
LFM2_FIXED = {"conv_bias": False}
LFM2_DERIVED: dict[str, Any] = {
    "num_key_value_heads": lambda s: max(key_heads(s)),
    "layer_types": _kinds(LFM2_LAYERS),
}
QWEN35: dict[str, Rule] = LLAMA | {
    "rope.dimension_sections": Unused("a token of text has one position for all sections"),
    "ssm.conv_kernel": Set("linear_conv_kernel_dim", read=count),
    "ssm.state_size": Set("linear_key_head_dim", read=count),
    "ssm.group_count": Set("linear_num_key_heads", read=count),
    "ssm.time_step_rank": Set("linear_num_value_heads", read=count),
    "ssm.inner_size": Only(
        lambda value, s: value == s["linear_key_head_dim"] * s["linear_num_value_heads"],
        "the state size times the rank of time steps",
    ),
    "full_attention_interval": Set("_interval", 4, count),
    "attention.recurrent_layers": Set("_recurrent", None, each_layer=True),
    "nextn_predict_layers": Set("_predictors", 0),
}
QWEN_MIXTURE: dict[str, Rule] = {
    "feed_forward_length": Unused("all layers are mixtures"),
    "expert_count": Set("num_experts", read=count),
    "expert_used_count": Set("num_experts_per_tok", read=count),
    "expert_feed_forward_length": Set("moe_intermediate_size", read=count),
    "expert_shared_feed_forward_length": Set("shared_expert_intermediate_size", read=count),
    "expert_gating_func": one_of(SOFTMAX),
    "expert_weights_norm": one_of(True),
}
QWEN35_DERIVED: dict[str, Any] = {
    # The file counts the blocks that predict further tokens.
    "num_hidden_layers": lambda s: s["num_hidden_layers"] - some_layers("_predictors", "nextn_predict_layers")(s),
    "linear_value_head_dim": same_as("linear_key_head_dim"),
    "layer_types": _qwen_layers,
}
# Norms add one, but for that of a linear layer. Value heads are dealt out to the key heads by turns in a file.
QWEN35_UNDO: dict[str, Undo] = {
    ".ssm_a": then(log_of_negative, value_heads),
    ".ssm_norm.weight": lambda values, config: values,
    ".ssm_dt.bias": value_heads,
    ".ssm_alpha.weight": value_heads,
    ".ssm_beta.weight": value_heads,
    ".attn_gate.weight": value_heads,
    ".attn_qkv.weight": value_heads_behind_keys,
    ".ssm_conv1d.weight": value_heads_behind_keys,
    ".ssm_out.weight": columns_of_value_heads,
    "norm.weight": minus_one,
}
QWEN35_NAMES: dict[str, tuple[str, ...]] = {"linear_attn.dt_bias": ("ssm_dt.bias",)}


HYBRIDS: dict[str, Architecture] = {
    "mamba": Architecture(
        "mamba",
        {
            "context_length": Unused("a state has no positions"),
            "embedding_length": Set("hidden_size", read=count),
            "block_count": Set("num_hidden_layers", read=count),
            "feed_forward_length": one_of(0),
            "attention.head_count": one_of(0),
            "attention.head_count_kv": one_of(0),
            "attention.layer_norm_rms_epsilon": Set("layer_norm_epsilon"),
            "ssm.conv_kernel": Set("conv_kernel", read=count),
            "ssm.inner_size": Set("intermediate_size", read=count),
            "ssm.state_size": Set("state_size", read=count),
            "ssm.time_step_rank": Set("time_step_rank", read=count),
            "ssm.dt_b_c_rms": one_of(False),
            "vocab_size": NEUTRAL["vocab_size"],
        },
        rope=None,
        fixed={"use_bias": False, "use_conv_bias": True},
        derived={"expand": lambda s: s["intermediate_size"] // s["hidden_size"]},
        undo={"ssm_a": log_of_negative},
    ),
    "lfm2": Architecture("lfm2", LFM2, fixed=LFM2_FIXED | {"block_auto_adjust_ff_dim": False}, derived=LFM2_DERIVED),
    "lfm2moe": Architecture(
        "lfm2_moe",
        LFM2
        | {
            "leading_dense_block_count": Set("num_dense_layers", 0),
            "expert_count": Set("num_experts", read=count),
            "expert_used_count": Set("num_experts_per_tok", read=count),
            "expert_feed_forward_length": Set("moe_intermediate_size", read=count),
            "expert_gating_func": one_of(SIGMOID),
        },
        fixed=LFM2_FIXED | {"use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        derived=LFM2_DERIVED,
        names={"feed_forward.expert_bias": ("exp_probs_b.bias",)},
    ),
    "qwen35": Architecture(
        "qwen3_5_text",
        QWEN35,
        rope="partial",
        fixed={"attention_bias": False},
        derived=QWEN35_DERIVED,
        undo=QWEN35_UNDO,
        names=QWEN35_NAMES,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        QWEN35 | QWEN_MIXTURE,
        rope="partial",
        fixed={"attention_bias": False},
        derived=QWEN35_DERIVED,
        undo=QWEN35_UNDO,
        names=QWEN35_NAMES,
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        QWEN35 | QWEN_MIXTURE,
        rope="partial",
        fixed={"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        derived=QWEN35_DERIVED | {"intermediate_size": same_as("moe_intermediate_size")},
        undo={".ssm_a": log_of_negative} | {end: QWEN35_UNDO[end] for end in (".ssm_norm.weight", "norm.weight")},
        # Older files have queries, keys, values and gates in one matrix, as the model has them.
        names=QWEN35_NAMES
        | {"linear_attn.in_proj_qkvz.weight": ("ssm_in.weight", "attn_qkv.weight", "attn_gate.weight")},
        joined={"attn_qkv.weight": by_key_heads},
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        QWEN2
        | GRANITE
        | KEY_HEADS
        | {
            "rope.scaling.finetuned": Set("position_embedding_type", "rope", lambda value: "rope" if value else None),
            "expert_count": Set("num_local_experts", 0),
            "expert_used_count": Set("num_experts_per_tok", 0),
            "expert_feed_forward_length": equal("intermediate_size"),
            "expert_shared_feed_forward_length": Set("shared_intermediate_size", same_as("intermediate_size"), count),
            "ssm.conv_kernel": Set("mamba_d_conv", read=count),
            "ssm.inner_size": Set("_inner", read=count),
            "ssm.state_size": Set("mamba_d_state", read=count),
            "ssm.time_step_rank": Set("mamba_n_heads", read=count),
            "ssm.group_count": one_of(1),
        },
        fixed={"mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_proj_bias": False, "attention_bias": False},
        derived=GRANITE_DERIVED
        | {
            "num_key_value_heads": lambda s: max(key_heads(s)),
            "layer_types": _kinds(GRANITE_LAYERS),
            "mamba_expand": lambda s: s["_inner"] // s["hidden_size"],
            "mamba_d_head": lambda s: s["_inner"] // s["mamba_n_heads"],
        },
        undo=HALVES | {".ssm_a": log_of_negative},
        names=GRANITE_NAMES
        | {
            "mamba.dt_bias": ("ssm_dt.bias",),
            # Without experts, what they would share is all there is.
            "shared_mlp.input_linear.weight": (
                *("ffn_gate_shexp.weight", "ffn_gate.weight"),
                *("ffn_up_shexp.weight", "ffn_up.weight"),
            ),
            "shared_mlp.output_linear.weight": ("ffn_down_shexp.weight", "ffn_down.weight"),
        },
    ),
}
