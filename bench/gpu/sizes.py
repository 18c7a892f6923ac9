"""The sizes that the parts run on: real models' shapes, or tiny ones that rehearse every line on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from random_store import MIXTURES, MODELS

from mebp_triton.kernels.names import DEFAULT_FORM, Form
from mebp_triton.training.gradient_check import Kind

# What the linear layers of a new store have; and the kind that the shipped tables were made for.
STORED, SYMMETRIC = Kind(DEFAULT_FORM, two_level=True), Kind(Form("symmetric", 64))

Shape = tuple[int, int]

TINY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 128,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts; shapes are (N, K).

    Attributes:
        dtypes: the activations'; the first is the one that is timed.
        tokens, shapes: for the correctness cases.
        group_shapes: groups of weights that share their input.
        table, table_tokens: (V, K) of the embedding and head; rows looked up, and targets.
        repeats: how often one call must give the same bits.
        cases: random problems of ``bench/compiled.py``.
        speed_tokens, speed_shapes: the timed products with one weight.
        speed_groups: layers with one input, whose products are timed with their adapters.
        tune_tokens, tune_shapes: the tuned products; the first come first, as long as time lasts.
        samples: timed samples of each side.
        memory_shape, memory_tokens: the layer whose memory is measured.
        graph_shape, graph_tokens: the layer that is compiled and captured.
        models: configurations of the training steps, by name.
        sequence_lengths, steps: of these steps; the number of timed ones.
        paged_model, paged_mixture, paged_tokens: the models whose paged runs are compared with resident ones, one of
            them with experts, and their batch's length.
    """

    dtypes: tuple[torch.dtype, ...]
    tokens: tuple[int, ...]
    shapes: tuple[Shape, ...]
    group_shapes: tuple[tuple[Shape, ...], ...]
    table: Shape
    table_tokens: int
    repeats: int
    cases: int
    speed_tokens: tuple[int, ...]
    speed_shapes: tuple[Shape, ...]
    speed_groups: tuple[tuple[Shape, ...], ...]
    tune_tokens: tuple[int, ...]
    tune_shapes: tuple[Shape, ...]
    samples: int
    memory_shape: Shape
    memory_tokens: int
    graph_shape: Shape
    graph_tokens: int
    models: dict[str, dict[str, Any]]
    sequence_lengths: tuple[int, ...]
    steps: int
    paged_model: dict[str, Any]
    paged_mixture: dict[str, Any]
    paged_tokens: int


QWEN_3B_SHAPES = ((11008, 2048), (2048, 11008), (2048, 2048), (256, 2048))
QWEN_3B_GROUPS = (((11008, 2048), (11008, 2048)), ((2048, 2048), (256, 2048), (256, 2048)), ((2048, 11008),))

REAL = Sizes(
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    tokens=(500, 1, 33, 2047, 16, 65, 129, 3, 64, 17, 0, 2, 15, 31, 63, 127),
    shapes=(
        *QWEN_3B_SHAPES,
        (896, 4864),
        (1536, 8960),
        (6912, 1152),
        (576, 1536),
        (2560, 10240),
        (1001, 328),
        (151936, 896),
        (262144, 1152),
    ),
    group_shapes=(*QWEN_3B_GROUPS[:2], ((4864, 896), (4864, 896))),
    table=(151936, 2048),
    table_tokens=500,
    repeats=100,
    cases=1000,
    speed_tokens=(256, 1, 1024, 16, 4096, 64),
    speed_shapes=((8192, 8192),),
    speed_groups=QWEN_3B_GROUPS,
    tune_tokens=(256, 16, 1024, 4096, 64, 32, 128, 512, 2048),
    tune_shapes=(*QWEN_3B_SHAPES, (2560, 2048), (22016, 2048), (8192, 8192)),
    samples=9,
    memory_shape=(8192, 8192),
    memory_tokens=512,
    graph_shape=(2048, 2048),
    graph_tokens=256,
    models={name: MODELS[name] for name in ("Qwen2.5-3B", "Qwen2.5-1.5B", "Qwen2.5-0.5B")},
    sequence_lengths=(256, 1024, 4096),
    steps=5,
    paged_model=MODELS["Qwen2.5-0.5B"] | {"num_hidden_layers": 4, "vocab_size": 32768},
    paged_mixture=MIXTURES["Qwen3-30B-A3B"] | {"num_hidden_layers": 3, "vocab_size": 32768, "num_experts": 32},
    paged_tokens=256,
)

# bfloat16 is left out: the interpreter computes it wrongly.
REHEARSAL = Sizes(
    dtypes=(torch.float32, torch.float16),
    tokens=(5, 0, 17),
    shapes=((33, 72),),
    group_shapes=(((48, 64), (16, 64), (16, 64)), ((32, 64), (32, 64))),
    table=(96, 64),
    table_tokens=7,
    repeats=2,
    cases=12,
    speed_tokens=(1, 16),
    speed_shapes=((32, 64),),
    speed_groups=(((48, 64), (16, 64), (16, 64)),),
    tune_tokens=(16,),
    tune_shapes=((64, 64),),
    samples=2,
    memory_shape=(64, 64),
    memory_tokens=8,
    graph_shape=(64, 64),
    graph_tokens=8,
    models={"tiny": TINY},
    sequence_lengths=(16,),
    steps=1,
    paged_model=TINY,
    paged_mixture=TINY
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    paged_tokens=8,
)
