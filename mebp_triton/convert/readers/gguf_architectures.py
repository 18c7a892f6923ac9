"""The table of GGUF architectures that are read: what each key of their files means for the model's config.

The keys are those that llama.cpp's loader reads for the architecture, and those of others that a converter may write.
Keys of RoPE are in ``gguf_rope.py``. Mixtures of experts and models with layers of several kinds have files of their
own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import __version__

from .gguf_gemma4 import GEMMA4
from .gguf_hybrids import HYBRIDS
from .gguf_keys import Architecture, Only, Set, Settings, Unused, equal, head_size, one_of, width_of_head
from .gguf_mixtures import MIXTURES
from .gguf_rules import (
    ADDS_ONE,
    GRANITE,
    GRANITE_DERIVED,
    HALVES,
    HEAD_OF_ANY_WIDTH,
    HEAD_OF_ONE_WIDTH,
    LLAMA,
    NEUTRAL,
    QWEN2,
    SHAPE,
    layer_types,
    period,
)
from .gguf_undo import by_heads, transposed


def _gemma(layers_of_27b: int) -> Callable[[Settings], int]:
    """The number that scales Gemma's queries. Its largest model alone has another, and no key says so."""
    return lambda s: head_size(s) if s["num_hidden_layers"] == layers_of_27b else width_of_head(s)


def _cap(value: Any) -> float | None:
    return float(value) or None


def _one_key_head(value: Any) -> int:
    if value != 1:
        raise ValueError("only with one key head is the fused matrix ordered by queries, keys, values")
    return 1


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
    "phi3": Architecture(
        "phi3",
        # llama.cpp says that it leaves this window out; the model that was converted has it.
        QWEN2 | {"attention.sliding_window": Set("sliding_window", None, lambda value: value or None)},
        rope="partial",
        scaled=frozenset(),
        factors=frozenset({"long"}),
    ),
    "gemma2": Architecture(
        "gemma2",
        LLAMA
        | {
            "attention.sliding_window": Set("sliding_window", 4096),
            "attention.sliding_window_pattern": Set("sliding_window_pattern", 2, period, each_layer=True),
            "attention.scale": one_of(0),
            "attn_logit_softcapping": Set("attn_logit_softcapping", 50.0, _cap),
            "final_logit_softcapping": Set("final_logit_softcapping", 30.0, _cap),
        },
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        derived={"query_pre_attn_scalar": _gemma(46), "layer_types": layer_types},
        undo=ADDS_ONE,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        LLAMA
        | {
            "attention.sliding_window": Set("sliding_window", 0),
            "attention.sliding_window_pattern": Set("sliding_window_pattern", 6, period, each_layer=True),
            "attention.scale": one_of(0),
            "final_logit_softcapping": Set("final_logit_softcapping", None, _cap),
        },
        rope="local",
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        derived={
            "query_pre_attn_scalar": _gemma(62),
            "layer_types": layer_types,
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
        # transformers 4 has a setting for it, and leaves it out.
        scaled=frozenset() if int(__version__.partition(".")[0]) < 5 else frozenset({"linear", "yarn"}),
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
    "smollm3": Architecture(
        "smollm3",
        LLAMA,
        fixed={"use_sliding_window": False, "no_rope_layer_interval": 4},
        tensors={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        undo=HALVES,
    ),
    "mistral3": Architecture(
        "ministral3",
        LLAMA | {"attention.temperature_scale": Set("llama_4_scaling_beta", 0.0)},
        factors=frozenset({"freqs"}),
        yarn_multiplier=1.0,
        fixed={"sliding_window": None},
        derived={"model_type": lambda s: "ministral3" if s["llama_4_scaling_beta"] else "mistral"},
        undo=HALVES,
    ),
    "granite": Architecture(
        "granite",
        QWEN2 | GRANITE | {"rope.scaling.finetuned": one_of(True)},
        factors=frozenset({"freqs"}),
        tensors={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        derived=GRANITE_DERIVED,
        undo=HALVES,
    ),
}
ARCHITECTURES |= {"gemma4": GEMMA4} | MIXTURES | HYBRIDS
