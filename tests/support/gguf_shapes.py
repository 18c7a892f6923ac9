"""The tensors of tiny models of every GGUF architecture that is read, by GGUF's names."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf_files import TOKENS

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD, LAYERS, CONTEXT, WINDOW = len(TOKENS), 64, 96, 4, 2, 16, 2, 128, 8
EXPERTS, EXPERT_FFN, SHARED_FFN = 4, 32, 40
QUERIES, KEYS = HEADS * HEAD, KV_HEADS * HEAD
ATTENTION_BIASES = {
    "attn_q.bias": (QUERIES,),
    "attn_k.bias": (KEYS,),
    "attn_v.bias": (KEYS,),
    "attn_output.bias": (HIDDEN,),
}
Tensors = dict[str, tuple[int, ...]]
Keys = dict[str, Any]


def norm(name: str, bias: bool = False) -> Tensors:
    return {f"{name}.weight": (HIDDEN,)} | ({f"{name}.bias": (HIDDEN,)} if bias else {})


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def attention(bias: str = "") -> Tensors:
    return (
        linear("attn_q", QUERIES, HIDDEN, "q" in bias)
        | linear("attn_k", KEYS, HIDDEN, "q" in bias)
        | linear("attn_v", KEYS, HIDDEN, "q" in bias)
        | linear("attn_output", HIDDEN, QUERIES, "o" in bias)
    )


def mlp(gate: bool = True, bias: bool = False, width: int = FFN) -> Tensors:
    gates = linear("ffn_gate", width, HIDDEN, bias) if gate else {}
    return gates | linear("ffn_up", width, HIDDEN, bias) | linear("ffn_down", HIDDEN, width, bias)


def experts() -> Tensors:
    return {
        "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
        "ffn_gate_exps.weight": (EXPERTS, EXPERT_FFN, HIDDEN),
        "ffn_up_exps.weight": (EXPERTS, EXPERT_FFN, HIDDEN),
        "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_FFN),
    }


def model(block: Tensors, head: bool = True, bias: bool = False, **more: tuple[int, ...]) -> Tensors:
    """All tensors of a model: ``block``'s in each block, and those outside."""
    tensors: Tensors = {"token_embd.weight": (VOCAB, HIDDEN)} | norm("output_norm", bias)
    tensors |= {"output.weight": (VOCAB, HIDDEN)} if head else {}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return tensors | more


NORMS = norm("attn_norm") | norm("ffn_norm")
BIASED_NORMS = norm("attn_norm", True) | norm("ffn_norm", True)
HEAD_NORMS: Tensors = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
GEMMA = NORMS | norm("post_attention_norm") | norm("post_ffw_norm") | attention() | mlp()
FUSED = (
    BIASED_NORMS
    | linear("attn_qkv", 3 * HIDDEN, HIDDEN, True)
    | linear("attn_output", HIDDEN, HIDDEN, True)
    | mlp(gate=False, bias=True, width=4 * HIDDEN)
)
MAMBA = (
    norm("attn_norm")
    | linear("ssm_in", 4 * HIDDEN, HIDDEN)
    | {"ssm_conv1d.weight": (2 * HIDDEN, 4), "ssm_conv1d.bias": (2 * HIDDEN,), "ssm_x.weight": (36, 2 * HIDDEN)}
    | linear("ssm_dt", 2 * HIDDEN, 4, True)
    | {"ssm_a": (2 * HIDDEN, 16), "ssm_d": (2 * HIDDEN,), "ssm_out.weight": (HIDDEN, 2 * HIDDEN)}
)

CONVOLUTION = {"conv.weight": (HIDDEN, 3), "in_proj.weight": (3 * HIDDEN, HIDDEN), "out_proj.weight": (HIDDEN, HIDDEN)}
LFM2 = (
    {"token_embd.weight": (VOCAB, HIDDEN)}
    | norm("token_embd_norm")
    | {f"blk.0.shortconv.{name}": shape for name, shape in CONVOLUTION.items()}
    | {f"blk.0.{name}": shape for name, shape in (NORMS | mlp()).items()}
    | {f"blk.1.{name}": shape for name, shape in (NORMS | attention() | HEAD_NORMS | mlp()).items()}
)

MODELS: dict[str, Tensors] = {
    "llama": model(NORMS | attention() | mlp()),
    "qwen2": model(NORMS | attention("q") | mlp()),
    "qwen3": model(NORMS | attention() | HEAD_NORMS | mlp(), head=False),
    "qwen2moe": model(
        NORMS
        | attention("q")
        | experts()
        | {"ffn_gate_inp_shexp.weight": (HIDDEN,)}
        | {name.replace(".", "_shexp."): shape for name, shape in mlp(width=SHARED_FFN).items()}
    ),
    "qwen3moe": model(NORMS | attention() | HEAD_NORMS | experts()),
    "phi3": model(
        NORMS
        | linear("attn_qkv", QUERIES + 2 * KEYS, HIDDEN)
        | linear("attn_output", HIDDEN, QUERIES)
        | linear("ffn_up", 2 * FFN, HIDDEN)
        | linear("ffn_down", HIDDEN, FFN)
    ),
    "gemma2": model(GEMMA, head=False),
    "gemma3": model(GEMMA | HEAD_NORMS, head=False),
    "starcoder2": model(BIASED_NORMS | attention("qo") | mlp(gate=False, bias=True), head=False, bias=True),
    "stablelm": model(BIASED_NORMS | attention("q") | mlp(), bias=True),
    "nemotron": model(BIASED_NORMS | attention() | mlp(gate=False), bias=True),
    "falcon": model(
        norm("attn_norm", True)
        | linear("attn_qkv", QUERIES + 2 * HEAD, HIDDEN)
        | linear("attn_output", HIDDEN, QUERIES)
        | mlp(gate=False),
        bias=True,
    ),
    "bloom": model(FUSED, bias=True) | norm("token_embd_norm", True),
    "gpt2": model(FUSED, bias=True) | {"position_embd.weight": (CONTEXT, HIDDEN)},
    "mamba": model(MAMBA),
    "lfm2": LFM2,
    "lfm2moe": {name: shape for name, shape in LFM2.items() if not name.startswith("blk.1.ffn_")}
    | {f"blk.1.{name}": shape for name, shape in experts().items()}
    | {"blk.1.ffn_norm.weight": (HIDDEN,), "blk.1.exp_probs_b.bias": (EXPERTS,)},
    "minimax-m2": model(
        NORMS
        | attention()
        | {"attn_q_norm.weight": (QUERIES,), "attn_k_norm.weight": (KEYS,)}
        | experts()
        | {"exp_probs_b.bias": (EXPERTS,)}
    ),
}
LATENT, QUERY_LATENT, NOPE, ROPE_PART = 32, 24, 8, 8
STATE, STATE_HEADS, KEY_GROUPS = 16, 4, 2  # of linear attention: width of a head, value heads, key heads
INNER = 2 * HIDDEN
SHARED = {name.replace(".", "_shexp."): shape for name, shape in mlp(width=SHARED_FFN).items()}
ONE_SHARED = {name.replace(".", "_shexp."): shape for name, shape in mlp(width=EXPERT_FFN).items()}
DELTA: Tensors = {
    "attn_qkv.weight": ((2 * KEY_GROUPS + STATE_HEADS) * STATE, HIDDEN),
    "attn_gate.weight": (STATE_HEADS * STATE, HIDDEN),
    "ssm_conv1d.weight": ((2 * KEY_GROUPS + STATE_HEADS) * STATE, 4),
    "ssm_dt.bias": (STATE_HEADS,),
    "ssm_a": (STATE_HEADS,),
    "ssm_alpha.weight": (STATE_HEADS, HIDDEN),
    "ssm_beta.weight": (STATE_HEADS, HIDDEN),
    "ssm_norm.weight": (STATE,),
    "ssm_out.weight": (HIDDEN, STATE_HEADS * STATE),
}
GATED = attention() | linear("attn_q", 2 * QUERIES, HIDDEN) | HEAD_NORMS
QWEN35_NORMS = norm("attn_norm") | norm("post_attention_norm")
QWEN35_MIXTURE = QWEN35_NORMS | experts() | SHARED | {"ffn_gate_inp_shexp.weight": (HIDDEN,)}
MAMBA2: Tensors = {
    "ssm_in.weight": (2 * INNER + 2 * STATE + STATE_HEADS, HIDDEN),
    "ssm_conv1d.weight": (INNER + 2 * STATE, 4),
    "ssm_conv1d.bias": (INNER + 2 * STATE,),
    "ssm_dt.bias": (STATE_HEADS,),
    "ssm_a": (STATE_HEADS, 1),
    "ssm_d": (STATE_HEADS, 1),
    "ssm_norm.weight": (1, INNER),
    "ssm_out.weight": (HIDDEN, INNER),
}
LATENTS_OF_KEYS: Tensors = (
    linear("attn_kv_a_mqa", LATENT + ROPE_PART, HIDDEN)
    | {"attn_kv_a_norm.weight": (LATENT,)}
    | {"attn_k_b.weight": (HEADS, LATENT, NOPE), "attn_v_b.weight": (HEADS, HEAD, LATENT)}
    | linear("attn_output", HIDDEN, QUERIES)
)
LATENTS = (
    LATENTS_OF_KEYS
    | linear("attn_q_a", QUERY_LATENT, HIDDEN)
    | {"attn_q_a_norm.weight": (QUERY_LATENT,)}
    | linear("attn_q_b", HEADS * (NOPE + ROPE_PART), QUERY_LATENT)
)
QUERIES_ALONE = linear("attn_q", HEADS * (NOPE + ROPE_PART), HIDDEN)
PREDICTOR: Tensors = {
    "nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    "nextn.enorm.weight": (HIDDEN,),
    "nextn.hnorm.weight": (HIDDEN,),
}
OPENAI_EXPERTS: Tensors = experts() | {
    "ffn_gate_inp.bias": (EXPERTS,),
    "ffn_gate_exps.bias": (EXPERTS, EXPERT_FFN),
    "ffn_up_exps.bias": (EXPERTS, EXPERT_FFN),
    "ffn_down_exps.bias": (EXPERTS, HIDDEN),
}


def blocks(*each: Tensors, head: bool = True) -> Tensors:
    """A model whose blocks differ."""
    named = {f"blk.{layer}.{name}": shape for layer, block in enumerate(each) for name, shape in block.items()}
    return model({}, head) | named


MODELS |= {
    "smollm3": blocks(*[NORMS | attention() | mlp()] * 4, head=False),  # the fourth has no RoPE
    "mistral3": model(NORMS | attention() | mlp()),
    "granite": model(NORMS | attention() | mlp(), head=False),
    "granitemoe": model(NORMS | attention() | experts() | SHARED, head=False),
    "granitehybrid": blocks(NORMS | MAMBA2 | mlp(), NORMS | attention() | mlp(), head=False),
    "qwen35": blocks(QWEN35_NORMS | DELTA | mlp(), QWEN35_NORMS | GATED | mlp()),
    "qwen35moe": blocks(QWEN35_MIXTURE | DELTA, QWEN35_MIXTURE | GATED),
    "qwen3next": blocks(
        QWEN35_MIXTURE
        | {name: shape for name, shape in DELTA.items() if name not in ("ssm_alpha.weight", "ssm_beta.weight")}
        | {"ssm_ba.weight": (2 * STATE_HEADS, HIDDEN)},
        QWEN35_MIXTURE | GATED,
    ),
    "gpt-oss": model(
        norm("attn_norm")
        | norm("post_attention_norm")
        | attention("qo")
        | {"attn_sinks.weight": (HEADS,)}
        | OPENAI_EXPERTS
    ),
    "deepseek2": blocks(
        NORMS | LATENTS | mlp(), NORMS | LATENTS | experts() | ONE_SHARED | {"exp_probs_b.bias": (EXPERTS,)}
    ),
}
WIDE_HEAD, PER_LAYER = 32, 8  # of Gemma 4: heads of full attention, and the input that each layer has of its own
ONE_HEAD = GEMMA | HEAD_NORMS | {"layer_output_scale.weight": (1,)}
WIDE_HEADS: Tensors = {
    "attn_q.weight": (HEADS * WIDE_HEAD, HIDDEN),
    "attn_k.weight": (KV_HEADS * WIDE_HEAD, HIDDEN),
    "attn_v.weight": (KV_HEADS * WIDE_HEAD, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * WIDE_HEAD),
    "attn_q_norm.weight": (WIDE_HEAD,),
    "attn_k_norm.weight": (WIDE_HEAD,),
}
OWN_INPUT: Tensors = {
    "inp_gate.weight": (PER_LAYER, HIDDEN),
    "proj.weight": (HIDDEN, PER_LAYER),
    "post_norm.weight": (HIDDEN,),
}
# The last two layers read the keys and values of the first two.
MODELS["gemma4"] = blocks(
    *(ONE_HEAD | wide | OWN_INPUT for wide in ({}, WIDE_HEADS)),
    *(
        {
            name: shape
            for name, shape in (ONE_HEAD | wide | OWN_INPUT).items()
            if not name.startswith(("attn_k", "attn_v"))
        }
        for wide in ({}, WIDE_HEADS)
    ),
    head=False,
) | {
    "per_layer_token_embd.weight": (VOCAB, 4 * PER_LAYER),
    "per_layer_model_proj.weight": (4 * PER_LAYER, HIDDEN),
    "per_layer_proj_norm.weight": (PER_LAYER,),
}
VALUES_ARE_KEYS: dict[str, Any] = {"attn_k.weight": (WIDE_HEAD, HIDDEN), "attn_v.weight": None}
GEMMA4_EXPERTS: Tensors = {
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_inp.scale": (HIDDEN,),
    "ffn_gate_up_exps.weight": (EXPERTS, 2 * EXPERT_FFN, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_FFN),
    "ffn_down_exps.scale": (EXPERTS,),
    **norm("pre_ffw_norm_2"),
    **norm("post_ffw_norm_1"),
    **norm("post_ffw_norm_2"),
}
PROPORTIONAL = np.array([1.0] * 4 + [1e30] * (WIDE_HEAD // 2 - 4), np.float32)
