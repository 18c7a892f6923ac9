"""Imports and caches what commands need while they run, so that a fork of this process starts in milliseconds."""

import gc
import importlib
import os
import pkgutil

# Before anything starts a thread: a fork has only the thread that forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch
from models import tiny_config

import mebp_triton
from mebp_triton.training.plan.inventory import Inventory
from mebp_triton.training.plan.planner import Planner
from mebp_triton.training.settings import TrainConfig

OTHERS = ["gguf", "datasets", "pyarrow.parquet", "matplotlib.figure", "bitsandbytes", "peft"]
OTHERS += ["transformers.modeling_gguf_pytorch_utils", "transformers.models.llama.modeling_llama"]

torch.set_num_threads(1)
for module in pkgutil.walk_packages(mebp_triton.__path__, "mebp_triton."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in OTHERS:
    importlib.import_module(name)
# A plan traces a step on fake tensors. Most of its time goes into what torch caches on the way.
config = tiny_config("llama")
Planner(Inventory.of_config(config), config).default(TrainConfig(device="cpu", max_length=24, lora_r=2))
# Commands collect garbage before they measure memory. What is frozen here is neither searched nor copied then.
gc.collect()
gc.freeze()
