"""Stores of random weights at a model's shapes, written block by block, and the published configurations."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.blocks.runner import find_blocks
from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.accuracy import random_weight
from mebp_triton.kernels.layout import CHUNK, RUN, Int4Weight, pack, super_count, unpack
from mebp_triton.kernels.names import Scheme
from mebp_triton.models.skeleton import Int4Site, build_skeleton, float_names, int4_sites
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.system import atomic

QWEN2_5: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
GEMMA_3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LLAMA_3_2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# The published configurations. Gemma-3-4B is its text model, whose table is padded to 262208 rows.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": QWEN2_5
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "Qwen2.5-1.5B": QWEN2_5
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "Qwen2.5-3B": QWEN2_5
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "Gemma-3-1B": GEMMA_3
    | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    | {"num_key_value_heads": 1, "vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768},
    "Gemma-3-4B": GEMMA_3
    | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 1024, "max_position_embeddings": 131072}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "Llama-3.2-1B": LLAMA_3_2 | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "Llama-3.2-3B": LLAMA_3_2
    | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}

# Mixtures of experts, for whose shapes no tables of configurations are made.
MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
}

# The root mean square of the 16 codes' values at scale 1: for affine around their mean, for codebook NF4's.
RMS: dict[Scheme, float] = {"symmetric": 4.64, "affine": 4.61, "codebook": 0.517}


def write_random_store(
    config: Any,
    target: Path,
    device: torch.device,
    scheme: Scheme = "symmetric",
    group_size: int = 64,
    tokenizer: Any = None,
    two_level: bool = False,
) -> None:
    """Writes a store whose entries are as large as an initialised model's: activations stay finite in all blocks.

    Draws from torch's global generators. No matrix is ever decoded, and only one file's tensors are in memory.

    Args:
        config: a causal language model's.
        target: must not exist, or be empty. It appears whole or not at all.
        device: where the codes are drawn.
        scheme, group_size: of all matrices.
        tokenizer: saved beside the weights.
        two_level: whether scales are bytes, with a float16 number for each 256 columns.

    Raises:
        ValueError: transformers makes no such model from the config, or ``target`` is in use.
    """
    model = build_skeleton(config, torch.float32)
    path, stack = find_blocks(model)
    sites, tied = int4_sites(model)
    floats = float_names(model, sites)
    rms = getattr(config, "initializer_range", 0.02)
    done: set[str] = set()

    def write(writer: StoreWriter, file: str, prefix: str) -> None:
        mine = [site for site in sites if site.name.startswith(prefix) and site.name not in done]
        kept = [name for name in floats if name.startswith(prefix) and name not in done]
        matrices = {site.name: (random_matrix(site, rms, scheme, group_size, device, two_level), 0.0) for site in mine}
        experts = {site.name for site in mine if site.role == "expert"}
        writer.write_file(file, matrices, {name: initial_value(model, name) for name in kept}, experts)
        done.update(matrices, kept)

    with atomic.atomic_directory(target) as directory:
        config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        writer = StoreWriter(directory, "random weights", tied)
        for index in range(len(stack)):
            write(writer, block_file(index), f"{path}.{index}.")
        write(writer, SHARED, "")
        writer.finish()


def random_matrix(
    site: Int4Site, rms: float, scheme: Scheme, group_size: int, device: torch.device, two_level: bool = False
) -> Int4Weight:
    """A random weight whose scales have one size and random signs, since the mean of the codes is not zero."""
    # Importing it starts torch's threads, which a process that forks later must not have.
    from mebp_triton.kernels.group_fit import NF4

    k = site.in_features
    weight = random_weight(site.out_features, k, device, scheme, group_size)
    if k % CHUNK:
        # Padding as a store has it.
        last = weight.packed[:, -RUN:]
        last.copy_(pack(unpack(last, k % CHUNK), pad_code=8 if scheme == "symmetric" else 0))
    signs, size = torch.where(weight.scales < 0, -1.0, 1.0).half(), rms / RMS[scheme]
    weight = replace(weight, scales=signs * size, codebook=NF4.to(device) if scheme == "codebook" else None)
    if scheme == "affine":
        weight = replace(weight, minimum=weight.scales * -7.5)
    if two_level:
        supers = torch.full((super_count(k), site.out_features), size / 127, dtype=torch.float16, device=device)
        steps = (signs * 127).to(torch.int8)
        least = {"minimum": -steps, "super_minimum": supers * 7.5} if scheme == "affine" else {}
        weight = replace(weight, **{"scales": steps, "super_scales": supers} | least)
    return weight.to("cpu")


def initial_value(model: Any, name: str) -> Tensor:
    """A float parameter as transformers initialises it: a norm may multiply by its weight, or by one more than it."""
    owner, _, attribute = name.rpartition(".")
    module = copy.copy(model.get_submodule(owner))
    value = nn.Parameter(torch.zeros(model.get_parameter(name).shape), requires_grad=False)
    # A copy of its own, in which only this parameter is real.
    module._parameters = module._parameters | {attribute: value}
    model._init_weights(module)
    return value.data
