"""Tiny configs of every causal language model that transformers has, for ``families.py``.

A config's defaults are kept but for its sizes: each setting that ``SIZES`` knows by its name becomes small, in the
config and in the configs inside of it. ``SPECIAL`` has what some architectures need besides.
"""

from __future__ import annotations

from typing import Any

VOCABULARY, WIDTH, LAYERS, HEADS = 97, 64, 4, 4

SIZES: dict[str, Any] = {}
for value, names in (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (WIDTH, "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size embedding_dim lru_width"),
    (WIDTH, "input_embedding_size output_embedding_size backbone_hidden_size hidden_size_global out_hidden_size"),
    (96, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dim_ff dff d_inner mlp_dim"),
    (96, "feed_forward_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    (32, "expert_ffn_hidden_size moe_shared_expert_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
    (LAYERS, "num_encoder_layers num_blocks"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (HEADS, "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads"),
    (HEADS, "linear_num_value_heads linear_num_heads"),
    (2, "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads"),
    (16, "head_dim swa_head_dim qk_nope_head_dim v_head_dim linear_head_dim linear_key_head_dim kv_channels dim_head"),
    (16, "linear_value_head_dim attention_head_size d_head global_head_dim index_head_dim"),
    (8, "qk_rope_head_dim rotary_dim index_topk"),
    (32, "kv_lora_rank q_lora_rank o_lora_rank"),
    (4, "index_n_heads"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions"),
    (128, "context_length original_max_position_embeddings"),
    (8, "sliding_window window_size local_attention attention_window_size sliding_window_size attention_chunk_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers"),
    (8, "mamba_d_state state_size ssm_state_size"),
    (8, "mamba_n_heads mamba_num_heads"),
    (16, "mamba_d_head mamba_head_dim mamba_headdim"),
    (2, "n_groups mamba_n_groups mamba_ngroups"),
    (8, "mamba_chunk_size chunk_size"),
    (8, "time_step_rank mamba_dt_rank laurel_rank"),
    (16, "hidden_size_per_layer_input"),
    (2, "patch_size spatial_merge_size"),
):
    SIZES |= dict.fromkeys(names.split(), value)
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Attention through a latent: as many heads of keys as of queries, and rotated parts whose width is the head's.
LATENT = {"head_dim": 8, "num_key_value_heads": HEADS}
SLIDING = ["sliding_attention", "full_attention"] * 2
ROPE_BY_TYPE = dict.fromkeys(SLIDING, {"rope_type": "default", "rope_theta": 10000.0})
MIXER = {"mamba_d_head": 16, "mamba_n_heads": 8}
SHARED_KEYS = {"num_kv_shared_layers": 2, "layer_types": SLIDING}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | {"layer_group_size": 2},
    "bamba": MIXER | {"attn_layer_indices": [1, 3]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_TYPE, "layer_types": SLIDING},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": LATENT,
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH, "num_key_value_heads": 4},
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [-1] * LAYERS,
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
    },
    "falcon_h1": MIXER | {"mamba_d_ssm": 128},
    "gemma3n_text": SHARED_KEYS | {"intermediate_size": [96] * LAYERS, "altup_num_inputs": 2},
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": MIXER | {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "mamba"]},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [4, 6],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 1,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xlstm": {"num_heads": 2, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# What refuses to be trained in eval mode; it has no dropout here.
IN_TRAIN_MODE = {"reformer"}


def tiny_config(model_type: str) -> Any:
    """Makes the tiny config of an architecture, by its name in transformers' tables."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    return kind(**_small(kind))


def _small(kind: Any) -> dict[str, Any]:
    """The settings of ``SIZES``, ``TOKENS`` and ``SPECIAL`` that a config of this class has."""
    inside = dict(getattr(kind, "sub_configs", None) or {})
    default = kind()
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in inside and hasattr(value, "to_dict"):
            found[name] = {"model_type": value.model_type} | _small(type(value))
        elif name in SIZES and value is not None:
            found[name] = SIZES[name]
    for name in TOKENS:
        if hasattr(default, name):
            found[name] = TOKENS[name]
    return found | SPECIAL.get(kind.model_type, {})
