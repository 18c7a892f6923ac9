"""Gemma 4 in GGUF: heads of two widths, keys and values that later layers share, an input of each layer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .gguf_keys import NOT_HERE, Architecture, Set, Settings, equal, head_size, one_of, same_as
from .gguf_rules import LLAMA, some_layers


def _gemma4_kinds(settings: Settings) -> list[str]:
    """The kinds of the layers. The last has full attention, as in transformers' model, or the file is refused."""
    slides = settings["_slides"]
    if not isinstance(slides, list) or slides[-1]:
        raise ValueError(f"attention.sliding_window_pattern is {slides!r:.100}, {NOT_HERE}")
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _of_kind(name: str, kind: str) -> Callable[[Settings], Any]:
    """The number that all layers of a kind have in the setting ``name``; None without such layers."""

    def number(settings: Settings) -> Any:
        numbers = settings[name]
        numbers = numbers if isinstance(numbers, list) else [numbers] * settings["num_hidden_layers"]
        found = {each for each, of in zip(numbers, settings["layer_types"], strict=True) if of == kind}
        if len(found) > 1:
            raise ValueError(f"attention.head_count_kv is {numbers!r:.100}, {NOT_HERE}")
        return found.pop() if found else None

    return number


def _full_values_are_keys(settings: Settings) -> bool:
    """Whether layers of full attention have no matrix of values: then these are the keys."""
    layers = len(settings["layer_types"]) - settings["num_kv_shared_layers"]
    own = {
        f"blk.{layer}.attn_v.weight" in settings["_tensors"]
        for layer, kind in enumerate(settings["layer_types"][:layers])
        if kind == "full_attention"
    }
    if len(own) > 1:
        raise ValueError(
            f"attention.shared_kv_layers is {settings['num_kv_shared_layers']}: some have values, {NOT_HERE}"
        )
    if own == {True} and settings["num_global_key_value_heads"] != settings["num_key_value_heads"]:
        raise ValueError(f"attention.head_count_kv is {settings['_key_heads']!r:.100} beside values, {NOT_HERE}")
    return own == {False}


def _is_double_wide(settings: Settings) -> bool:
    """Whether the layers without keys of their own have twice as wide an MLP as the others."""
    widths, layers = settings["_widths"], settings["num_hidden_layers"]
    widths = widths if isinstance(widths, list) else [widths] * layers
    own = layers - settings["num_kv_shared_layers"]
    double = [widths[0]] * own + [2 * widths[0]] * (layers - own)
    if widths not in (double, [widths[0]] * layers):
        raise ValueError(f"feed_forward_length is {widths!r:.100}, {NOT_HERE}")
    return bool(own < layers and widths == double)


GEMMA4_DERIVED: dict[str, Any] = {
    "num_kv_shared_layers": some_layers("num_kv_shared_layers", "attention.shared_kv_layers"),
    "intermediate_size": lambda s: s["_widths"][0] if isinstance(s["_widths"], list) else s["_widths"],
    "use_double_wide_mlp": _is_double_wide,
    "layer_types": _gemma4_kinds,
    "num_global_key_value_heads": _of_kind("_key_heads", "full_attention"),
    "num_key_value_heads": lambda s: _of_kind("_key_heads", "sliding_attention")(s) or s["num_global_key_value_heads"],
    "attention_k_eq_v": _full_values_are_keys,
    "enable_moe_block": lambda s: s["num_experts"] is not None,
}


GEMMA4 = Architecture(
    "gemma4_text",
    LLAMA
    | {
        "feed_forward_length": Set("_widths", each_layer=True),
        "attention.head_count_kv": Set("_key_heads", same_as("num_attention_heads"), each_layer=True),
        "attention.key_length": Set("global_head_dim", head_size),
        "attention.value_length": equal("global_head_dim"),
        "attention.key_length_swa": Set("head_dim"),
        "attention.value_length_swa": equal("head_dim"),
        "attention.scale": one_of(1),
        "attention.sliding_window": Set("sliding_window"),
        "attention.sliding_window_pattern": Set("_slides", each_layer=True),
        "attention.shared_kv_layers": Set("num_kv_shared_layers", 0),
        "embedding_length_per_layer_input": Set("hidden_size_per_layer_input", 0),
        "final_logit_softcapping": Set("final_logit_softcapping", None, lambda value: value or None),
        "rope.dimension_count": equal("global_head_dim"),
        "rope.dimension_count_swa": equal("head_dim"),
        "expert_count": Set("num_experts", None, lambda value: value or None),
        "expert_used_count": Set("top_k_experts", None, lambda value: value or None),
        "expert_feed_forward_length": Set("moe_intermediate_size", None, lambda value: value or None),
    },
    rope="kinds",
    factors=frozenset({"freqs"}),
    fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    derived=GEMMA4_DERIVED,
    vocabularies=("vocab_size_per_layer_input",),
    adapterless=frozenset({"per_layer_model_proj.weight"}),
    names={
        "router.scale": ("ffn_gate_inp.scale",),
        "router.per_expert_scale": ("ffn_down_exps.scale",),
    },
)
