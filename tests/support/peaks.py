"""Runs as a program: trains with one set of settings after the other, and prints planned and measured peaks as JSON.

Every peak is this process's own high-water mark, set back between the runs.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.data.packing import pack
from mebp_triton.data.tokenized import DataReport, TokenizedData
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.tables import DTYPES
from mebp_triton.models.load import load
from mebp_triton.store.reader import Store
from mebp_triton.system import memory
from mebp_triton.system.memory import return_free_memory, return_large_freed_memory
from mebp_triton.training.evaluation import evaluate
from mebp_triton.training.plan.inventory import Inventory
from mebp_triton.training.plan.phases import FIRST_STEPS
from mebp_triton.training.plan.planner import Planner
from mebp_triton.training.run_directory import RunDirectory
from mebp_triton.training.run_settings import RunSettings, resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.trainer import Trainer


def random_tokens(vocabulary: int, rows: int, length: int) -> TokenizedData:
    ids = np.random.default_rng(0).integers(3, vocabulary, rows * length).astype(np.int32)
    report = DataReport(rows, ids.size, ids.size, 0, 0)
    return TokenizedData(ids, np.ones(ids.size, bool), np.arange(rows + 1) * length, report)


def random_store(config: Any, directory: Path) -> Path:
    """A store of random weights, made without a model."""
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    inventory = Inventory.of_config(config)
    writer = StoreWriter(directory, "random", inventory.tied_head)
    for file, tensors in inventory.files.items():
        matrices = {}
        for name, info in inventory.matrices.items():
            if info.file == file:
                packed = torch.randint(0, 256, tensors[f"{name}.packed"][1], dtype=torch.uint8)
                scales = torch.full(tensors[f"{name}.scales"][1], 0.005, dtype=torch.float16)
                matrices[name] = Int4Weight(packed, scales, info.shape[1], info.group_size), 0.0
        floats = {name: torch.ones(tensors[name][1]) for name, place in inventory.floats.items() if place == file}
        writer.write_file(file, matrices, floats)
    writer.finish()
    return directory


def train(store: str, settings: RunSettings) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = load(
            store,
            settings.lora(),
            weights=settings.weights,
            checkpoints=settings.checkpoints,
            dtype=DTYPES[settings.dtype],
            scratch_directory=directory,
            recompute_granularity=settings.recompute_granularity,
            mlp_chunk_tokens=settings.mlp_chunk_tokens,
            block_rows=settings.per_device_train_batch_size if settings.join_micro_batches else None,
        )
        vocabulary = model.config.get_text_config().vocab_size
        rows = settings.max_steps * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        parts = 4 if settings.packing else 1
        data = random_tokens(vocabulary, rows * parts, settings.max_length // parts)
        if settings.packing:
            data = pack(data, settings.max_length)
        made = Trainer(model, data, settings, RunDirectory(Path(directory) / "run"))
        made.train(evaluate=lambda: evaluate(model, data, settings.max_eval_windows))


def measure(store: str, settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    asked = TrainConfig(device="cpu", return_freed_memory=True, **settings)
    gc.collect()
    return_free_memory()
    floor = memory.resident().total
    planner = Planner(Inventory.of_store(Store(store)), AutoConfig.from_pretrained(store), floor - FIRST_STEPS)
    plan = planner.predict(planner.default(asked))
    del planner
    return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")
    train(store, plan.settings)
    return {"settings": settings, "floor": floor, "planned": plan.peak, "measured": memory.peak_resident_bytes()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    runs = json.loads(Path(sys.argv[1]).read_text())
    return_large_freed_memory()
    train(runs[0][0], resolve(TrainConfig(device="cpu", max_steps=2, max_length=64, recompute_granularity="full")))
    for store, settings in runs:
        print(json.dumps(measure(store, settings)), flush=True)
