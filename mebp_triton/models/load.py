"""The public entry: a store -> a transformers model that trains block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mebp_triton.blocks.engine import BlockEngine, watch_training
from mebp_triton.blocks.options import GRANULARITIES, Granularity
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.layers.int4_module import Int4Module, Int4Table
from mebp_triton.layers.lora_config import LoraConfig, as_lora_config
from mebp_triton.layers.loss import OnePassLoss, install_loss
from mebp_triton.store.arena import Stager
from mebp_triton.store.block_inputs import block_input_store
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.store.pages import Pages
from mebp_triton.store.placement import host_copy, place_weights
from mebp_triton.store.reader import Store, open_store
from mebp_triton.store.residency import Residency, check_residency
from mebp_triton.store.table_rows import StoredRows
from mebp_triton.store.waiting import Waiting
from mebp_triton.system.foreign_errors import one_line

from .build import Builder, check_targets
from .config import check_sizes, read_config
from .discover import install_mlp_chunks, join_shared_inputs
from .saving import install_saving
from .skeleton import build_skeleton


@dataclass
class Runtime:
    """What ``load`` hangs on the model as ``model.mebp``."""

    store: Store
    engine: BlockEngine
    loss: OnePassLoss
    lora: LoraConfig | None
    device: torch.device
    backend: str


def load(
    store: Store | Path | str,
    lora: LoraConfig | Any | None = None,
    *,
    weights: Residency = "device",
    checkpoints: Residency = "device",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    attn_implementation: str | None = None,
    blocks: str | None = None,
    seed: int = 0,
    scratch_directory: Path | str | None = None,
    recompute_granularity: Granularity = "full",
    mlp_chunk_tokens: int | None = None,
    head: Literal["int4", "float"] = "int4",
) -> Any:
    """The transformers model of ``store``, in eval mode, as ``from_pretrained`` would return it.

    Its linear layers, embedding and head are int4; ``loss.backward()`` runs block by block; only LoRA parameters
    require gradients. ``model(..., labels=...)`` computes no logits unless called with ``return_logits=True``, or, with
    gradients off, when something is done with them.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        lora: ours or a ``peft.LoraConfig``; None for a frozen model.
        weights: where the blocks' weights lie: "device", "host", or "file" (memory-mapped, dropped after use).
        checkpoints: where the blocks' inputs wait for the backward pass: "device", "host" or "file".
        device, dtype: where and in which dtype activations are computed ("bfloat16" is torch.bfloat16).
        adapter_dtype: float32 or bfloat16.
        backend: "auto", "triton" or "panel".
        attn_implementation: as in transformers.
        blocks: the path of the block list, where it is not found by itself.
        seed: of the adapter's initial values.
        scratch_directory: where checkpoints in a file go; the system's temporary directory by default.
        recompute_granularity: "full" keeps each block's input; "selective" the outputs of its adapted linear layers as
            well, which then are not computed again. Same gradients, to the bit.
        mlp_chunk_tokens: the MLPs run by chunks of that many tokens, forward and backward; None or 0: whole.
        head: "float" decodes the head's weight into a plain linear layer, for trainers that multiply by it themselves
            (TRL's ``SFTTrainer``). It takes vocabulary x hidden size x the size of ``dtype``, and logits are computed.

    Raises:
        ValueError: the store or its generation config is damaged, or an argument does not fit.
    """
    check_residency("weights", weights)
    check_residency("checkpoints", checkpoints)
    if recompute_granularity not in GRANULARITIES:
        known = " or ".join(GRANULARITIES)
        raise ValueError(f"recompute_granularity must be {known}, got {recompute_granularity!r}")
    if adapter_dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"adapter_dtype must be float32 or bfloat16, got {adapter_dtype}")
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        dtype = named
    if head not in ("int4", "float"):
        raise ValueError(f"head must be int4 or float, got {head!r}")
    device = torch.device(device)
    resolve_backend(backend, device)
    opened = open_store(store)
    config = lora if lora is None else as_lora_config(lora)
    model_config = read_config(opened.directory, "quantize the model again")
    check_sizes(f"store {opened.directory}", model_config, opened.shapes())
    model = build_skeleton(model_config, dtype, attn_implementation)
    _take_generation_config(model, opened.directory)
    blocks_path, stack = find_blocks(model, blocks)
    builder = Builder(opened, model, config, device, dtype, adapter_dtype, backend, seed)
    replaced, int4_head = builder.replace_modules()
    builder.place_floats()
    if config is not None:
        check_targets(config, builder.adapted, type(model).__name__)
        join_shared_inputs(model, model_config)

    waiting = Waiting()
    largest = max(opened.files[block_file(index)].data().numel() for index in range(len(stack)))
    stager = Stager(device, waiting, largest) if device.type != "cpu" and weights != "device" else None
    pages: list[Pages] = []
    for index in range(len(stack)):
        prefix = f"{blocks_path}.{index}."
        inside = {name: replaced.pop(name) for name in list(replaced) if name.startswith(prefix)}
        pages.append(place_weights(opened, block_file(index), inside, weights, device, stager, waiting))
    _place_tables(opened, replaced, weights, device, stager, waiting)
    if opened.tied_head:
        table = model.get_input_embeddings()
        int4_head.set_int4(table.int4())
        int4_head.rows, int4_head.device = table.rows, table.device
    if head == "float":
        name = next(name for name, module in model.named_modules() if module is int4_head)
        builder.swap(name, int4_head.decoded())

    install_mlp_chunks(model, stack, mlp_chunk_tokens)
    scratch = Path(scratch_directory) if scratch_directory is not None else Path(tempfile.gettempdir())
    keep_outputs = recompute_granularity == "selective"
    engine = BlockEngine(stack, pages, block_input_store(checkpoints, scratch, waiting), keep_outputs, waiting)
    watch_training(model, blocks_path, engine)
    model.mebp = Runtime(opened, engine, install_loss(model, int4_head), config, device, backend)
    model.gradient_checkpointing_enable = _no_second_checkpointing
    model.tie_weights = _tied_already
    install_saving(model)
    # DistributedDataParallel would send all of it, and write it back into the mapped files' pages.
    model._ddp_params_and_buffers_to_ignore = FrozenNames(model)
    return model


def _take_generation_config(model: Any, directory: Path) -> None:
    """As ``from_pretrained`` does: it says where chats end, and how to sample."""
    path = directory / "generation_config.json"
    if model.can_generate() and path.exists():
        with one_line(f"{path} is not a usable generation config", "compare it with the model's original"):
            model.generation_config = type(model.generation_config).from_pretrained(directory)


class FrozenNames:
    """The names of all that is not trained in a model, as it is when they are asked for.

    They are there as well with the prefix that they have in a PEFT model, which hands out the attributes of the model
    that it was put around.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __iter__(self) -> Iterator[str]:
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                yield from (name, f"base_model.model.{name}")
        for name, _ in self.model.named_buffers(remove_duplicate=False):
            yield from (name, f"base_model.model.{name}")


def _place_tables(
    store: Store,
    modules: dict[str, Int4Module],
    weights: Residency,
    device: torch.device,
    stager: Stager | None,
    waiting: Waiting,
) -> None:
    """The embedding and the head: resident, or by their rows. Linear layers outside of any block are resident."""
    tables = {name: module for name, module in modules.items() if isinstance(module, Int4Table)}
    by_rows = weights == "file" or stager is not None
    if not by_rows:
        place_weights(store, SHARED, modules, "device", device, None, waiting)
        return
    if outside := modules.keys() - tables.keys():
        store.files[SHARED].verify()
        for name in outside:
            modules[name].set_int4(store.weight(name).to(device, copy=True))
        store.files[SHARED].mapped.drop()
    host = host_copy(store.files[SHARED], device) if weights == "host" else None
    for name, table in tables.items():
        table.rows, table.device = StoredRows(store, name, device, stager, waiting, host), device
        table.set_int4(store.weight(name) if device.type == "cpu" else store.weight(name).to("meta"))


def _no_second_checkpointing(*args: Any, **kwargs: Any) -> None:
    """The blocks are checkpointed already; trainers that ask for it again change nothing."""


def _tied_already(*args: Any, **kwargs: Any) -> None:
    """A tied head has the embedding's rows from the start, and no parameter; lm-eval asks for it again."""
