"""A model's config: read without running code, and compared with the weights that it should describe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.store.reader import Store
from mebp_triton.system import strict_json
from mebp_triton.system.foreign_errors import one_line

from .language_part import whole_class

# Far above any model. transformers takes memory and time for each label, row or layer that a config asks for.
MOST_LABELS, MOST_LENGTH, MOST_LAYERS = 1 << 16, 1 << 25, 1 << 12
# The settings that are the length of a weight, and those that count layers, in every architecture that has them.
LENGTHS = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
LENGTHS += ["moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"]
LENGTHS += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "conv_L_cache"]
LENGTHS += [f"linear_{name}" for name in ("conv_kernel_dim", "num_key_heads", "num_value_heads")]
LENGTHS += ["linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"]
LENGTHS += [f"mamba_{name}" for name in ("n_heads", "d_head", "d_state", "d_conv", "expand")]
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """Reads the object in a strict JSON file.

    Raises:
        ValueError: the file is missing, no regular file (a FIFO would block its reader), not strict JSON, or holds
            something else; ``remedy`` says what to do.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing or not a regular file; {remedy}")
    content = strict_json.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, wanted an object; {remedy}")
    return content


def read_config(path: Path, remedy: str) -> PretrainedConfig:
    """Reads the config of a model directory, or a ``config.json``. Nothing is fetched, and no code of it runs.

    Raises:
        ValueError: it is damaged, or of a model that this transformers does not have; ``remedy`` says what to do.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    file = path / "config.json" if path.is_dir() else path
    content = read_json_object(file, remedy)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        why = "needs code from the checkpoint, which is never run" if "auto_map" in content else "is unknown"
        raise ValueError(f"{file}: model_type {model_type!r:.100} {why}: give an architecture this transformers has")
    if (setting := _code_on_the_hub(content)) is not None:
        raise ValueError(f"{file}: {setting} names code on the hub, which is never run: take it out")
    labels = content.get("num_labels", 0)
    if type(labels) is not int or labels > MOST_LABELS:
        raise ValueError(f"{file}: num_labels is {labels!r:.100}; {remedy}")
    with one_line(f"{file} is not a usable config", remedy):
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
    if excess := _first_above(text, MOST_LENGTH, MOST_LAYERS):
        raise ValueError(f"{file}: {excess}, more than any model has; {remedy}")
    return config


def read_store_config(store: Store) -> PretrainedConfig:
    """Reads the config of an opened store, and compares it with the store's weights; see ``read_config``."""
    config = read_config(store.directory, "quantize the model again")
    check_sizes(f"store {store.directory}", config, store.shapes())
    return config


def _first_above(config: PretrainedConfig, longest: int, most: int) -> str | None:
    """The first length above ``longest`` or count above ``most``, as text; None if there is none."""
    for names, limit in ((COUNTS, most), (LENGTHS, longest)):
        for name in names:
            for value in _values(config, name):
                if type(value) is int and value > limit:
                    return f"{name} is {value!r:.100}"
    return None


def _values(config: PretrainedConfig, name: str) -> list[Any]:
    """The values of a setting: one, or that of each layer where layers have their own, as in Gemma 4."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:  # transformers 5 refuses to tell the value of the whole model
        layers: Any = getattr(config, "per_layer_config", ())
        return [getattr(layer, name, None) for layer in layers]


def _code_on_the_hub(value: Any) -> str | None:
    """The first setting for which transformers would fetch and import code: ``attn_implementation: "owner/kernel"``."""
    if isinstance(value, list):
        return next(filter(None, map(_code_on_the_hub, value)), None)
    if not isinstance(value, dict):
        return None
    for key, item in value.items():
        texts = item.values() if isinstance(item, dict) else [item]
        if key.endswith("_implementation") and any("/" in text for text in texts if isinstance(text, str)):
            return f"{key} {item!r:.100}"
    return next(filter(None, map(_code_on_the_hub, value.values())), None)


def check_sizes(where: str, config: PretrainedConfig, shapes: Iterable[tuple[int, ...]]) -> None:
    """Compares a config with the shapes of the weights, before a model of any size is built from it.

    Raises:
        ValueError: the config asks for far more than the weights have.
    """
    known = list(shapes)
    longest = 8 * max((length for shape in known for length in shape), default=0)
    if excess := _first_above(config.get_text_config(), longest, max(longest, len(known))):
        raise ValueError(
            f"{where}: {excess}, more than the weights have: the weights and the config do not belong together"
        )


def check_vocabulary(config: PretrainedConfig, data: TokenizedData, what: str) -> None:
    """Raises ValueError where ``data`` has token ids that the model does not have: its tokenizer is another model's."""
    size, highest = config.get_text_config().vocab_size, data.highest_id()
    if highest >= size:
        raise ValueError(
            f"{what} has the token id {highest}, and the model {size} tokens: its tokenizer belongs to another model, "
            f"or got new tokens (then resize the float model's embedding, save it, and quantize it again)"
        )


def prepare_config(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Names the causal language model in ``architectures``, and drops what tells where the config came from.

    For a model for text and images, that is the whole model, whose other parts ``build_skeleton`` leaves out. Where
    ``architectures`` names the language model alone, its config is returned.

    Raises:
        ValueError: the config is of another kind of model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    declared = config.architectures or []
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise ValueError(
            f"{where}: architectures is {declared!r}, wanted a list of class names: correct its config.json"
        )
    whole = whole_class(config)
    model_class: Any = whole or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    part = whole is None and _is_part(config, model_class)
    causal = [name for name in declared if name.endswith(("ForCausalLM", "LMHeadModel"))]
    foreign = declared and not causal and model_class is not None and model_class.__name__ not in declared
    if getattr(config, "is_encoder_decoder", False) or model_class is None or foreign:
        raise ValueError(
            f"{where}: {', '.join(declared) or config.model_type} is not a decoder-only language model: give one whose "
            f"architecture in config.json is a ...ForCausalLM, such as LlamaForCausalLM"
        )
    if part:
        config = _text_config(config)
    config.architectures = [model_class.__name__]
    config.name_or_path = ""
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def _is_part(config: PretrainedConfig, model_class: Any) -> bool:
    """Whether ``model_class`` is only the language model of what ``config`` describes, as for Qwen3.5 and Llama 4."""
    text = getattr(config, "sub_configs", {}).get("text_config")
    return text is not None and getattr(model_class, "config_class", None) is text


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model, with what only the whole model's config has of it."""
    text = config.get_text_config()
    if (settings := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = settings
    if getattr(text, "dtype", None) is None:
        text.dtype = getattr(config, "dtype", None)
    return text
