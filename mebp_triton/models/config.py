"""A model's config, read without running any code and checked against its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mebp_triton.system import strict_json
from mebp_triton.system.foreign_errors import one_line

# Far above any model; what is built from a config takes memory and time for each.
MOST_LABELS, MOST_LENGTH, MOST_LAYERS = 1 << 16, 1 << 25, 1 << 12
# Settings that a weight has as a length, and those that count layers, in every architecture that has them.
LENGTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")


def read_config(path: Path, remedy: str) -> PretrainedConfig:
    """The config of a directory, or in a ``config.json``. Nothing is fetched, and none of its code runs.

    Raises:
        ValueError: it is none that this transformers can use, or its JSON is not strict.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    file = path / "config.json" if path.is_dir() else path
    content = strict_json.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, wanted an object; {remedy}")
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        why = "needs code from the checkpoint, which is never run" if "auto_map" in content else "is not known"
        raise ValueError(f"{file}: model_type {model_type!r:.100} {why}: give an architecture this transformers has")
    if (named := _code_on_the_hub(content)) is not None:
        raise ValueError(f"{file}: {named} names code on the hub, which is never run: take it out")
    labels = content.get("num_labels", 0)
    if type(labels) is not int or labels > MOST_LABELS:  # transformers makes a name for each
        raise ValueError(f"{file}: num_labels is {labels!r:.100}; {remedy}")
    with one_line(f"{file} is not a usable config", remedy):
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
    for names, most in ((LENGTHS, MOST_LENGTH), (COUNTS, MOST_LAYERS)):
        for name in names:
            value = getattr(text, name, None)
            if type(value) is int and value > most:
                raise ValueError(f"{file}: {name} is {value!r:.100}, more than any model has; {remedy}")
    return config


def _code_on_the_hub(value: Any) -> str | None:
    """A setting such as ``attn_implementation: "owner/kernel"``, for which transformers would fetch and import code."""
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
    """ValueError where a config asks for far more than the weights have: its model could take any amount of memory."""
    known = list(shapes)
    longest = 8 * max((length for shape in known for length in shape), default=0)
    text = config.get_text_config()
    for names, most in ((LENGTHS, longest), (COUNTS, max(longest, len(known)))):
        for name in names:
            value = getattr(text, name, None)
            if type(value) is int and value > most:
                raise ValueError(
                    f"{where}: {name} is {value!r:.100}, more than the weights have: "
                    f"the weights and the config do not belong together"
                )


def prepare_config(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Names the causal language model class in ``architectures`` and drops traces of where the config came from."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    declared = config.architectures or []
    if not isinstance(declared, list) or not all(isinstance(name, str) for name in declared):
        raise ValueError(
            f"{where}: architectures is {declared!r}, wanted a list of class names: correct its config.json"
        )
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    causal = [name for name in declared if name.endswith(("ForCausalLM", "LMHeadModel"))]
    foreign = declared and not causal and known is not None and known.__name__ not in declared
    if getattr(config, "is_encoder_decoder", False) or known is None or foreign:
        raise ValueError(
            f"{where}: {', '.join(declared) or config.model_type} is no decoder-only language model; "
            f"give one that AutoModelForCausalLM loads"
        )
    config.architectures = [known.__name__]
    config.name_or_path = ""
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config
