"""Tiny, randomly initialised models of many architectures, and the same models as transformers + PEFT sees them."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import PREFIX, adapter_layers, adapter_tensors
from mebp_triton.models.experts import fused_experts
from mebp_triton.models.load import load
from mebp_triton.store.reader import Store

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in COMMON.items() if key not in names} | more


GQA = COMMON | {"head_dim": 16}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"tie_word_embeddings": True},
    "qwen2": COMMON | {"tie_word_embeddings": False},
    "qwen3": GQA,
    "gemma3_text": GQA
    | {
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": COMMON | {"sliding_window": 8},
    "phi3": COMMON | {"rope_scaling": None},
    "gpt2": GPT2,
    "gpt_neox": _without("num_key_value_heads", rotary_pct=0.5),
    "opt": _without("intermediate_size", "num_key_value_heads", ffn_dim=80, word_embed_proj_dim=48),
    "granite": COMMON | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "phi": COMMON | {"partial_rotary_factor": 0.5},
}
ARCHITECTURES = list(SETTINGS)
# What only a few tests need: keys and values shared between blocks, experts, and layers without attention.
SETTINGS["gemma3n_text"] = GQA | {
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 3,
    "intermediate_size": [80] * 3,
}
SETTINGS["granitemoe"] = COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS["bloom"] = {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 4}
MIXER = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
MAMBA = _without("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
SETTINGS["mamba"] = SETTINGS["falcon_mamba"] = MAMBA | {"state_size": 8}
SETTINGS["mamba2"] = MAMBA | {"state_size": 8, "num_heads": 6, "head_dim": 16, "n_groups": 2, "chunk_size": 8}
SETTINGS["bamba"] = COMMON | MIXER | {"attn_layer_indices": [1]}
SETTINGS["falcon_h1"] = COMMON | MIXER | {"mamba_d_ssm": 96, "head_dim": 12}
SETTINGS["nemotron_h"] = COMMON | {
    "head_dim": 12,
    "layers_block_type": ["mamba", "attention", "mamba"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "moe_intermediate_size": 48,  # of experts, which no layer here has
    "moe_shared_expert_intermediate_size": 48,
}
SETTINGS["granitemoehybrid"] = (
    COMMON
    | MIXER
    | {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
    }
)
MIXTURE = GQA | {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
# Mixtures of experts in one tensor (transformers 5), all experts of a kind that the interface allows.
SETTINGS |= {
    "qwen3_moe": MIXTURE | {"num_experts": 6, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "mixtral": GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": COMMON | {"num_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": GQA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 8}
    | {"hidden_size": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "deepseek_v3": COMMON
    | {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 40}
    | {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "qwen3_next": MIXTURE
    | {"num_experts": 6, "shared_expert_intermediate_size": 40, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": MIXTURE | {"num_experts": 6, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
}
MIXTURES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text"]
MIXTURES += ["lfm2_moe", "granitemoehybrid"]
SETTINGS["rwkv"] = MAMBA | {"attention_hidden_size": 48, "context_length": 64, "rescale_every": 2}
SETTINGS["lfm2"] = COMMON | {"layer_types": ["conv", "conv", "conv"]}
# Layers of a class of their own; a head whose bias has two names; blocks that share a layer, each with an adapter.
SETTINGS["falcon"] = _without("intermediate_size", "num_key_value_heads", new_decoder_architecture=True, num_kv_heads=2)
SETTINGS["bert"] = _without("num_key_value_heads", is_decoder=True)
SETTINGS["olmo_hybrid"] = COMMON | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Blocks that run several times a step, and hand on two hidden states.
SETTINGS["hrm_text"] = _without("num_key_value_heads", num_layers_per_stack=2)
SETTINGS["zamba2"] = COMMON | {
    "layers_block_type": ["hybrid", "mamba", "hybrid"],
    "mamba_d_state": 8,
    "n_mamba_heads": 6,
    "chunk_size": 8,
    "num_key_value_heads": 4,
}


# Models for text and images, as their checkpoints are: the text model's settings, and those of the tower for images.
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
QWEN3_5 = GQA | {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GEMMA4 = GQA | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
}
LLAMA4 = GQA | {"intermediate_size_mlp": 80, "num_local_experts": 4, "num_experts_per_tok": 1}
COMPOSITE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        GQA | {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8},
        TOWER | {"image_size": 16},
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        GEMMA4,
        TOWER | {"head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 16},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        QWEN3_5,
        QWEN_TOWER | {"out_hidden_size": 48, "num_position_embeddings": 16},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        LLAMA4,
        TOWER | {"image_size": 16, "vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        COMMON | {"model_type": "mistral"},
        TOWER | {"model_type": "pixtral", "image_size": 16, "head_dim": 16},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        COMMON | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
        QWEN_TOWER | {"out_hidden_size": 48},
    ),
}
SETTINGS["qwen3_5_moe_text"] = (
    QWEN3_5
    | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    | {"shared_expert_intermediate_size": 40}
)
SETTINGS |= {"gemma4_text": GEMMA4, "qwen3_5_text": QWEN3_5, "llama4_text": LLAMA4}


def composite_config(name: str) -> Any:
    kind, text, vision = COMPOSITE[name]
    more = {"mm_tokens_per_image": 4} if name == "gemma3" else {"audio_config": None} if name == "gemma4" else {}
    return AutoConfig.for_model(name, text_config=text, vision_config=vision, architectures=[kind], **more)


def save_composite_model(name: str, directory: Path, seed: int = 0) -> Path:
    """A random model for text and images, as ``save_pretrained`` writes it."""
    torch.manual_seed(seed)
    model = getattr(transformers, COMPOSITE[name][0])(composite_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory)
    return directory


def tiny_config(architecture: str, **changes: Any) -> Any:
    return AutoConfig.for_model(architecture, **(SETTINGS[architecture] | changes))


def save_tiny_model(architecture: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model of ``architecture``, as ``save_pretrained`` writes it; weights so large that all of it matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
    randomize_weights(model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def randomize_weights(model: Any) -> None:
    """Draws matrices and biases so large that all of them matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)


# More than 256 blocks of 64 in an MLP matrix: their scales, quantised in turn, have more than one block of their own.
BNB_SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 320}, "gpt2": {"n_embd": 64, "n_inner": 320}}


def bnb_directory(
    root: Path,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    skip: list[str] | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A tiny model that bitsandbytes quantised to 4 bits, as transformers saves it, with a tokenizer."""
    from runs import word_tokenizer

    source = save_tiny_model(architecture, root / "float", **(BNB_SIZES[architecture] | (config or {})))
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **options)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(root / "model")
    word_tokenizer().save_pretrained(root / "model")
    return root / "model"


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="mebp-triton-stores-")


def tiny_store(architecture: str, directory: Path | None = None, *, seed: int = 0, **options: Any) -> Path:
    """A store of a tiny model; ``options`` are ``quantize``'s, and the config's under ``config``."""
    root = Path(tempfile.mkdtemp(dir=_scratch().name)) if directory is None else directory
    source = save_tiny_model(architecture, root / "model", seed, **options.pop("config", {}))
    quantize(source, root / "store", **({"group_size": 32} | options))
    return root / "store"


@torch.no_grad()
def decoded_model(store: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model with the store's decoded weights: what every result is held against."""
    opened = Store(store)
    config = AutoConfig.from_pretrained(store)
    whole = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(config, dtype=dtype)
    experts = {
        found.matrix(expert, parameter): (model.get_parameter(f"{found.path}.{parameter}")[expert], found.transposed)
        for found in fused_experts(model)
        for expert, parameter in found.matrices()
    }
    for name in opened.matrices:
        value = decode(opened.weight(name), dtype)
        if name in experts:
            weight, is_turned = experts[name]
            weight.copy_(value.t() if is_turned else value)
            continue
        weight = model.get_submodule(name).weight
        transposed = isinstance(model.get_submodule(name), transformers.pytorch_utils.Conv1D)
        weight.copy_(value.t() if transposed else value)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in opened.floats:
        named[name].copy_(opened.float_tensor(name))
    return model.eval()


def peft_model(store: Path, model: Any, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """``decoded_model`` under PEFT, with the adapter values of ``model`` (ours)."""
    import peft

    tensors = adapter_tensors(model)
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **lora)
    # For some mixtures PEFT takes the names of shared experts' layers for those that experts had in transformers 4.
    as_named = mock.patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers")
    with as_named if transformers.__version__ >= "5" else nullcontext():
        wrapped = peft.get_peft_model(decoded_model(store, dtype), config, autocast_adapter_dtype=False)
    named = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name.replace(".weight", ".default.weight")].copy_(tensor)
    return wrapped.eval()


def randomize_adapter(model: Any, seed: int = 0, scale: float = 0.05) -> None:
    """B is zero at first, which would hide every gradient of A."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def batch(rows: int = 2, length: int = 20, padding: str | None = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids; with ``padding``, all rows but the first are shorter and padded on that side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row in range(1, rows):
            short = 3 * row
            mask[row, slice(length - short, None) if padding == "right" else slice(0, short)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def loaded(store: Path, lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """Our model of ``store``, with an adapter whose B is not zero; ``options`` are ``load``'s."""
    model = load(store, LoraConfig(**({"r": 4, "lora_alpha": 8} | (lora or {}))), **options)
    randomize_adapter(model)
    return model


def assert_same(ours: dict[str, Any], truth: dict[str, Any], tolerance: float = 0.0) -> None:
    """The same gradients exist, none of which is zero, and they are equal: to the bit without a tolerance."""
    assert ours.keys() == truth.keys() and any(grad is not None for grad in truth.values())
    for name, grad in truth.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            assert grad.norm() > 0, f"{name}: a zero gradient compares nothing"
            assert torch.equal(ours[name], grad) or relative_rms(ours[name], grad) <= tolerance > 0, name


def relative_rms(ours: torch.Tensor, truth: torch.Tensor) -> float:
    norm = truth.double().norm()
    return float((ours.double() - truth.double()).norm() / norm) if norm > 0 else float(ours.double().norm())


def peft_gradients(wrapped: Any) -> dict[str, torch.Tensor]:
    """Gradients by the names of ``adapter_tensors``."""
    return {
        name.replace(".default.weight", ".weight"): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name
    }


def our_gradients(model: Any) -> dict[str, torch.Tensor | None]:
    parameters = (part for layer in adapter_layers(model).values() for part in (layer.lora_A, layer.lora_B))
    return {name: parameter.grad for name, parameter in zip(adapter_tensors(model), parameters, strict=True)}


def step(model: Any, seed: int = 0, **examples: Any) -> dict[str, torch.Tensor | None]:
    """Our gradients of one forward and backward pass, by ``batch()`` or by ``examples``."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(**(examples or batch()), use_cache=False).loss.backward()
    return our_gradients(model)
