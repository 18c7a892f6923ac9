"""Tiny GGUF files in float32 of every architecture that is read, and of every key that changes what it computes.

``bench/gguf_reference.py`` runs them through llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import TOKENS, blocks_of
from gguf_shapes import (
    ATTENTION_BIASES,
    CONTEXT,
    EXPERT_FFN,
    EXPERTS,
    FFN,
    GATED,
    GEMMA4_EXPERTS,
    HEAD,
    HEADS,
    HIDDEN,
    INNER,
    KEY_GROUPS,
    KV_HEADS,
    LATENT,
    LATENTS_OF_KEYS,
    LAYERS,
    MODELS,
    NOPE,
    NORMS,
    ONE_HEAD,
    ONE_SHARED,
    PER_LAYER,
    PREDICTOR,
    PROPORTIONAL,
    QUERIES,
    QUERY_LATENT,
    QWEN35_MIXTURE,
    QWEN35_NORMS,
    ROPE_PART,
    SHARED,
    SHARED_FFN,
    STATE,
    STATE_HEADS,
    VALUES_ARE_KEYS,
    VOCAB,
    WIDE_HEAD,
    WIDE_HEADS,
    WINDOW,
    Keys,
    experts,
    linear,
    mlp,
)

# Ids of a prompt; the next token's probabilities are compared after 6 and after all of them.
PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 256, 48)]
LENGTHS = (6, len(PROMPT))
IDS = range(0, VOCAB, 17)

LAYER_NORM = {"starcoder2", "stablelm", "nemotron", "falcon", "bloom", "gpt2"}


def keys_of(arch: str) -> Keys:
    """The keys that a converter writes for the tiny model."""
    keys: Keys = {"context_length": CONTEXT, "embedding_length": HIDDEN, "block_count": LAYERS}
    keys |= {"feed_forward_length": FFN, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS}
    keys["attention.layer_norm_epsilon" if arch in LAYER_NORM else "attention.layer_norm_rms_epsilon"] = 1e-5
    if arch in ("bloom", "gpt2"):
        keys |= {"feed_forward_length": 4 * HIDDEN, "attention.head_count_kv": HEADS}
    else:
        keys |= {"rope.freq_base": 5000.0}
    if arch == "falcon":
        keys["attention.head_count_kv"] = 1
    if arch in ("gemma2", "gemma3"):
        keys |= {"attention.key_length": HEAD, "attention.value_length": HEAD, "attention.sliding_window": WINDOW}
    if arch == "gemma3":
        keys["attention.sliding_window_pattern"] = 2
    if arch in ("qwen2moe", "qwen3moe"):
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
    if arch == "lfm2moe":
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
        keys |= {"leading_dense_block_count": 1, "expert_gating_func": 2}
    if arch in ("lfm2", "lfm2moe"):
        keys |= {"attention.head_count_kv": [0, KV_HEADS], "shortconv.l_cache": 3}
    if arch in ("smollm3", "mistral3", "qwen35", "qwen35moe", "qwen3next", "gpt-oss"):
        keys |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    if arch == "smollm3":
        keys["block_count"] = 4
    if arch.startswith("granite"):
        keys |= {"logit_scale": 2.0, "embedding_scale": 3.0, "residual_scale": 0.7, "attention.scale": 0.3}
    if arch == "granitemoe":
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "feed_forward_length": EXPERT_FFN}
        keys |= {"expert_shared_feed_forward_length": SHARED_FFN}
    if arch == "granitehybrid":
        keys |= {"attention.head_count_kv": [0, KV_HEADS], "rope.scaling.finetuned": False}
        keys |= {"ssm.conv_kernel": 4, "ssm.inner_size": INNER, "ssm.state_size": STATE}
        keys |= {"ssm.time_step_rank": STATE_HEADS, "ssm.group_count": 1}
    if arch in ("qwen35", "qwen35moe", "qwen3next"):
        keys |= {"rope.dimension_count": HEAD // 2, "rope.dimension_sections": [2, 1, 1, 0]}
        keys |= {"ssm.conv_kernel": 4, "ssm.inner_size": STATE * STATE_HEADS, "ssm.state_size": STATE}
        keys |= {"ssm.time_step_rank": STATE_HEADS, "ssm.group_count": KEY_GROUPS, "full_attention_interval": 2}
    if arch in ("qwen35moe", "qwen3next"):
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
        keys |= {"expert_shared_feed_forward_length": SHARED_FFN}
    if arch == "gpt-oss":
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
        keys |= {"attention.sliding_window": WINDOW}
    if arch == "gemma4":
        keys |= {"block_count": 4, "attention.key_length": WIDE_HEAD, "attention.value_length": WIDE_HEAD}
        keys |= {"attention.key_length_swa": HEAD, "attention.value_length_swa": HEAD}
        keys |= {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, False] * 2}
        keys |= {"attention.shared_kv_layers": 2, "embedding_length_per_layer_input": PER_LAYER}
        keys |= {"rope.dimension_count": WIDE_HEAD, "rope.dimension_count_swa": HEAD, "rope.freq_base_swa": 300.0}
    if arch == "deepseek2":
        keys |= {"attention.head_count_kv": 1, "attention.key_length": LATENT + ROPE_PART}
        keys |= {"attention.value_length": LATENT, "attention.key_length_mla": NOPE + ROPE_PART}
        keys |= {"attention.value_length_mla": HEAD, "attention.q_lora_rank": QUERY_LATENT}
        keys |= {"attention.kv_lora_rank": LATENT, "rope.dimension_count": ROPE_PART, "leading_dense_block_count": 1}
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
        keys |= {"expert_shared_count": 1, "expert_weights_scale": 1.5, "expert_weights_norm": True}
        keys |= {"expert_gating_func": 2, "leading_dense_block_count": 1}
    if arch == "minimax-m2":
        keys |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_gating_func": 2}
        keys |= {"expert_feed_forward_length": EXPERT_FFN, "feed_forward_length": EXPERT_FFN}
    if arch == "qwen2moe":
        keys |= {"expert_shared_feed_forward_length": SHARED_FFN}
    if arch == "mamba":
        del keys["rope.freq_base"]
        keys |= {"feed_forward_length": 0, "attention.head_count": 0, "attention.head_count_kv": 0}
        keys |= {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * HIDDEN, "ssm.state_size": 16, "ssm.time_step_rank": 4}
    return keys


def llama3(factor: float, base: float, count: int, low: float = 1.0, high: float = 4.0, length: int = 8192):
    """Llama 3's factors by its published formula, one number at a time."""
    result = []
    for pair in range(count):
        wavelength = 2 * np.pi * base ** (pair / count)
        if wavelength < length / high:
            result.append(1.0)
        elif wavelength > length / low:
            result.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


LONG, SHORT = np.linspace(1.5, 9, 8, dtype=np.float32), np.linspace(1, 1.4, 8, dtype=np.float32)
LINEAR: Keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN: Keys = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
WIDE = {
    "attn_q": (HEADS * 32, HIDDEN),
    "attn_k": (KV_HEADS * 32, HIDDEN),
    "attn_v": (KV_HEADS * 32, HIDDEN),
    "attn_output": (HIDDEN, HEADS * 32),
    "attn_q_norm": (32,),
    "attn_k_norm": (32,),
}


def each_block(tensors: dict[str, Any], *layers: int) -> dict[str, Any]:
    """``tensors`` in each of ``layers``, or in the first two."""
    return {f"blk.{layer}.{name}": value for layer in layers or range(LAYERS) for name, value in tensors.items()}


def without(arch: str, *parts: str) -> dict[str, Any]:
    """The tensors of ``arch`` with one of ``parts`` in their names, to be left out."""
    return {name: None for name in MODELS[arch] if any(part in name for part in parts)}


def wide(arch: str) -> dict[str, Any]:
    names = [name for name in WIDE if f"blk.0.{name}.weight" in MODELS[arch]]
    return each_block({f"{name}.weight": WIDE[name] for name in names})


def variants(arch: str) -> dict[str, tuple[Keys, dict[str, Any]]]:
    """By name: the keys and tensors that a file has in place of the plain one's; None takes one out."""
    roped = arch not in ("bloom", "gpt2", "mamba")
    epsilon = next(key for key in keys_of(arch) if key.endswith("epsilon"))
    result: dict[str, tuple[Keys, dict[str, Any]]] = {"plain": ({}, {}), "epsilon": ({epsilon: 0.3}, {})}
    if arch not in ("bloom", "gpt2"):
        result["tied"] = ({}, {"output.weight": None})
    if roped:
        result |= {
            "no base": ({"rope.freq_base": None}, {}),
            "linear": (LINEAR, {}),
            "linear by its old key": ({"rope.scale_linear": 4.0}, {}),
            "a factor without a type": ({"rope.scaling.factor": 4.0}, {}),
            "type none": (LINEAR | {"rope.scaling.type": "none"}, {}),
            "yarn": (YARN, {}),
            "yarn of the context": (YARN | {"rope.scaling.original_context_length": None}, {}),
            "yarn with betas": (YARN | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}, {}),
            "yarn with attn_factor": (YARN | {"rope.scaling.attn_factor": 0.8}, {}),
            "yarn with yarn_attn_factor": (YARN | {"rope.scaling.yarn_attn_factor": 0.8}, {}),
            "yarn with ext_factor": (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, {}),
            "linear with attn_factor": (LINEAR | {"rope.scaling.attn_factor": 0.8}, {}),
            "half a head": ({"rope.dimension_count": HEAD // 2}, {}),
            "no key heads": ({"attention.head_count_kv": None}, each_block(many_keys(arch))),
            "a factor tensor": ({}, {"rope_freqs.weight": np.full(8, 4, np.float32)}),
            "wide heads": (
                {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
                wide(arch),
            ),
            "base of sliding layers": ({"rope.freq_base_swa": 300.0}, {}),
        }
    result |= {key: ({key: value}, {}) for key, value in OTHERS.items()}
    return result | OF_ONE.get(arch, {})


def many_keys(arch: str) -> dict[str, Any]:
    if "blk.0.attn_k.weight" not in MODELS[arch] or arch == "minimax-m2":
        return {}
    shapes = {"attn_k.weight": (QUERIES, HIDDEN), "attn_v.weight": (QUERIES, HIDDEN)}
    biases = {"attn_k.bias": (QUERIES,), "attn_v.bias": (QUERIES,)}
    return shapes | (biases if "blk.0.attn_k.bias" in MODELS[arch] else {})


# Keys of other architectures and of graphs that llama.cpp builds for some: each is refused where it would matter.
OTHERS: Keys = {
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.clamp_kqv": 0.5,
    "attention.max_alibi_bias": 4.0,
    "attention.sliding_window": 5,
    "attention.sliding_window_pattern": 1,
    "attention.temperature_scale": 0.5,
    "attention.output_scale": 0.5,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 0.5,
    "router_logit_softcapping": 0.5,
    "logit_scale": 0.5,
    "embedding_scale": 0.5,
    "residual_scale": 0.5,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "expert_shared_count": 3,
    "use_parallel_residual": True,
    "pooling_type": 1,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.finetuned": True,
    "vocab_size": 77,
    "nextn_predict_layers": 1,
    "swiglu_clamp_exp": 0.5,
    "ssm.dt_b_c_rms": True,
    "something.new": 1,
}
PAIRS = HEAD // 2
LONGROPE: Keys = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2}
OF_ONE: dict[str, dict[str, tuple[Keys, dict[str, Any]]]] = {
    "llama": {
        "llama 3": ({"rope.freq_base": 5e5}, {"rope_freqs.weight": llama3(8, 5e5, PAIRS)}),
        "llama 3 by 32": ({"rope.freq_base": 5e5}, {"rope_freqs.weight": llama3(32, 5e5, PAIRS)}),
        "factors of one": ({}, {"rope_freqs.weight": np.ones(PAIRS, np.float32)}),
        "other factors": ({}, {"rope_freqs.weight": LONG}),
        "factors and linear": (LINEAR | {"rope.freq_base": 5e5}, {"rope_freqs.weight": llama3(8, 5e5, PAIRS)}),
        "longrope": (
            LONGROPE | {"rope.scaling.type": "longrope"},
            {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        ),
        "longrope beside factors": (
            LONGROPE | {"rope.scaling.type": "longrope"},
            {name: LONG for name in ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight")},
        ),
        "longrope without factors": (LONGROPE | {"rope.scaling.type": "longrope"}, {}),
        "biases": (
            {},
            each_block(ATTENTION_BIASES | {"ffn_gate.bias": (FFN,), "ffn_up.bias": (FFN,), "ffn_down.bias": (HIDDEN,)}),
        ),
        "queries' biases alone": ({}, each_block({"attn_q.bias": (QUERIES,)})),
    },
    "phi3": {
        "longrope": (LONGROPE, {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}),
        "long factors alone": (LONGROPE, {"rope_factors_long.weight": LONG}),
        "longrope and linear": (
            LONGROPE | {"rope.scale_linear": 4.0},
            {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        ),
    },
    "gemma2": {
        "no caps": ({"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0}, {}),
        "other caps": ({"attn_logit_softcapping": 0.4, "final_logit_softcapping": 2.0}, {}),
        "no window": ({"attention.sliding_window": None}, {}),
    },
    "gemma3": {
        "no window": ({"attention.sliding_window": None}, {}),
        "its own period": ({"attention.sliding_window_pattern": None}, {}),
    },
    "stablelm": {
        "parallel": ({}, without("stablelm", "ffn_norm")),
        "head norms": ({}, each_block({"attn_q_norm.weight": (HEADS, HEAD), "attn_k_norm.weight": (KV_HEADS, HEAD)})),
    },
    "nemotron": {
        "biases": (
            {},
            each_block(ATTENTION_BIASES | {"ffn_up.bias": (FFN,), "ffn_down.bias": (HIDDEN,)}),
        )
    },
    "qwen3": {"biases": ({}, each_block({"attn_q.bias": (QUERIES,), "attn_output.bias": (HIDDEN,)}))},
    "qwen2": {"output bias": ({}, each_block({"attn_output.bias": (HIDDEN,)}))},
    "mistral3": {
        "temperature": (
            YARN | {"attention.temperature_scale": 0.5, "rope.scaling.yarn_log_multiplier": 1.0},
            {},
        ),
        "temperature alone": ({"attention.temperature_scale": 0.5}, {}),
    },
    "granite": {"no scales": ({"embedding_scale": None, "residual_scale": 0.0, "attention.scale": None}, {})},
    "granitemoe": {
        "alone": (
            {"expert_shared_feed_forward_length": None},
            without("granitemoe", "shexp"),
        )
    },
    "granitehybrid": {
        "mixture": (
            {"expert_count": EXPERTS, "expert_used_count": 2, "feed_forward_length": EXPERT_FFN}
            | {"expert_shared_feed_forward_length": SHARED_FFN},
            without("granitehybrid", "ffn_gate", "ffn_up", "ffn_down") | each_block(experts() | SHARED),
        ),
        "rope": ({"rope.scaling.finetuned": True}, {}),
    },
    "qwen35": {
        "stated layers": ({"full_attention_interval": None, "attention.recurrent_layers": [True, False]}, {}),
        "nextn_predict_layers": (
            {"block_count": 3, "nextn_predict_layers": 1},
            each_block(QWEN35_NORMS | GATED | mlp() | PREDICTOR, 2),
        ),
    },
    "qwen35moe": {
        "nextn_predict_layers": (
            {"block_count": 3, "nextn_predict_layers": 1},
            each_block(QWEN35_MIXTURE | GATED | PREDICTOR, 2),
        ),
    },
    "qwen3next": {
        "one matrix": (
            {},
            {"blk.0.attn_qkv.weight": None, "blk.0.attn_gate.weight": None}
            | {"blk.0.ssm_in.weight": (2 * (KEY_GROUPS + STATE_HEADS) * STATE, HIDDEN)},
        ),
        "nextn_predict_layers": ({"nextn_predict_layers": 0}, {}),
    },
    "gemma4": {
        "wide MLPs": (
            {"feed_forward_length": [FFN, FFN, 2 * FFN, 2 * FFN]},
            each_block(mlp(width=2 * FFN), 2, 3),
        ),
        "values are keys": (
            {"attention.shared_kv_layers": 0, "attention.head_count_kv": [KV_HEADS, 1] * 2},
            each_block(ONE_HEAD, 0, 2) | each_block(ONE_HEAD | WIDE_HEADS | VALUES_ARE_KEYS, 1, 3),
        ),
        "mixture": (
            {"embedding_length_per_layer_input": 0, "expert_count": EXPERTS, "expert_used_count": 2}
            | {"expert_feed_forward_length": EXPERT_FFN, "attention.shared_kv_layers": 0},
            without("gemma4", "per_layer", "inp_gate", ".proj", ".post_norm")
            | each_block(ONE_HEAD | GEMMA4_EXPERTS, 0, 2)
            | each_block(ONE_HEAD | WIDE_HEADS | GEMMA4_EXPERTS, 1, 3),
        ),
    },
    "deepseek2": {
        "yarn with its multiplier": (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, {}),
        "yarn with another multiplier": (YARN | {"rope.scaling.yarn_log_multiplier": 0.0707}, {}),
        "version 2": (
            {"expert_gating_func": None, "expert_weights_norm": None},
            without("deepseek2", "exp_probs_b"),
        ),
        "version 2 with yarn": (
            YARN | {"rope.scaling.yarn_log_multiplier": 0.0707, "expert_gating_func": 1, "expert_weights_norm": None},
            without("deepseek2", "exp_probs_b"),
        ),
        "version 2 with groups": (
            {"expert_gating_func": 1, "expert_weights_norm": None, "expert_group_count": 2},
            without("deepseek2", "exp_probs_b"),
        ),
        "groups": ({"expert_group_count": 2, "expert_group_used_count": 1}, {}),
        "no latent of queries": (
            {"attention.q_lora_rank": None, "block_count": 27},  # by which llama.cpp knows the model without one
            without("deepseek2", "attn_q_")
            | each_block({"attn_q.weight": (HEADS * (NOPE + ROPE_PART), HIDDEN)})
            | {
                f"blk.{layer}.{name}": shape
                for layer in range(2, 27)
                for name, shape in (
                    NORMS
                    | LATENTS_OF_KEYS
                    | linear("attn_q", HEADS * (NOPE + ROPE_PART), HIDDEN)
                    | experts()
                    | ONE_SHARED
                ).items()
            },
        ),
        "keys and values": (
            {"attention.head_count_kv": HEADS, "attention.key_length": NOPE + ROPE_PART, "attention.value_length": HEAD}
            | {"attention.key_length_mla": None, "attention.value_length_mla": None},
            without("deepseek2", "attn_k_b", "attn_v_b")
            | each_block({"attn_kv_b.weight": (HEADS * (NOPE + HEAD), LATENT)}),
        ),
    },
}


def values_of(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Random weights of a tensor, of a size that lets every one of them show in the logits."""
    values = random.normal(size=shape).astype(np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(values)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if len(shape) == 1:
        return 0.2 * values
    if ("embd" in name and "norm" not in name) or name == "output.weight":
        return 0.05 * values
    return values * np.float32(1.5 / np.sqrt(shape[-1]))


def write_variant(path: Path, arch: str, variant: str, kinds: dict[str, str] | None = None) -> Path:
    """Writes one file; the weights that it shares with the plain one are the same.

    Tensors whose names end with a key of ``kinds`` have that type; see ``blocks_of``.
    """
    changed_keys, changed_tensors = variants(arch)[variant]
    if arch == "gemma4":
        changed_tensors = {"rope_freqs.weight": PROPORTIONAL} | changed_tensors
    writer = gguf.GGUFWriter(path, arch)
    add: dict[type, Any] = {list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32}
    add |= {float: writer.add_float32, str: writer.add_string}
    for key, value in (keys_of(arch) | changed_keys).items():
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges(["t h", "th e"])
    for name, shape in sorted((MODELS[arch] | changed_tensors).items()):
        if isinstance(shape, tuple):
            seed = [ord(letter) for letter in name]
            shape = values_of(name, shape, np.random.default_rng(seed))
            if arch == "gemma4" and name.endswith("attn_q_norm.weight"):
                shape *= 0.25  # its scores have no scale of their own
        kind = next((kind for end, kind in (kinds or {}).items() if name.endswith(end)), None)
        if kind is not None:
            number = gguf.GGMLQuantizationType[kind]
            blocks = blocks_of(number, shape, np.random.default_rng(len(name)))
            writer.add_tensor(name, blocks, raw_dtype=number)
        elif shape is not None:
            writer.add_tensor(name, np.ascontiguousarray(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
