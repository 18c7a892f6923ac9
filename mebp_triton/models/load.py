"""The public ``load``: from a store to a transformers model that trains block by block."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mebp_triton.blocks.engine import BlockEngine, watch_training
from mebp_triton.blocks.graph_players import device_player
from mebp_triton.blocks.graphs import BlockGraphs
from mebp_triton.blocks.options import GRANULARITIES, Granularity
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.kernels.routing import resolve_backend
from mebp_triton.layers.head import Int4Head
from mebp_triton.layers.int4_module import Int4Module, Int4Table, restore_embedding
from mebp_triton.layers.lora_config import LoraConfig, as_lora_config
from mebp_triton.layers.loss import OnePassLoss
from mebp_triton.store.arena import Stager
from mebp_triton.store.block_inputs import block_input_store
from mebp_triton.store.experts import ExpertPlaces
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.store.pages import Pages
from mebp_triton.store.placement import host_copy, place_weights
from mebp_triton.store.reader import Store, open_store
from mebp_triton.store.residency import Residency, check_residency
from mebp_triton.store.table_rows import StoredRows
from mebp_triton.store.waiting import Waiting
from mebp_triton.system.foreign_errors import one_line

from .build import Builder, Numerics, check_adapter_dtype
from .config import read_store_config
from .discover import install_mlp_chunks
from .fused_operations import install_fused_operations
from .operation_kernels import has_kernels
from .row_places import check_block_rows, row_places
from .saving import ignore_in_ddp, install_saving
from .skeleton import build_skeleton
from .targets import resolve_targets


@dataclass
class Runtime:
    """The parts that a loaded model is made of and runs by: its attribute ``mebp``.

    ``stops``: ids that end a text besides those of the store; see ``generation.add_stops``.
    """

    store: Store
    engine: BlockEngine
    loss: OnePassLoss
    lora: LoraConfig | None
    device: torch.device
    backend: str
    stops: list[int] = field(default_factory=list)


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
    block_rows: int | None = None,
    block_graphs: bool = False,
    head: Literal["int4", "float"] = "int4",
    embedding: Literal["int4", "float"] = "int4",
) -> Any:
    """Loads the transformers model of ``store``, in eval mode, as ``from_pretrained`` would return it.

    Its linear layers, embedding and head are int4; ``loss.backward()`` runs block by block; only LoRA parameters
    require gradients. ``model(..., labels=...)`` computes no logits unless called with ``return_logits=True``, or, with
    gradients off, when something is done with them.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        lora: our ``LoraConfig`` or a ``peft.LoraConfig``; None for a frozen model.
        weights: where the blocks' weights lie: "device", "host", or "file" (memory-mapped, dropped after use).
        checkpoints: where the blocks' inputs wait for the backward pass: "device", "host" or "file".
        device, dtype: where and in which dtype activations are computed ("bfloat16" is torch.bfloat16).
        adapter_dtype: float32 or bfloat16.
        backend: "auto", "triton" or "panel".
        attn_implementation: as in transformers.
        blocks: the path of the block list, where it is not found by itself.
        seed: draws the adapter's initial values.
        scratch_directory: where block inputs in a file go; the system's temporary directory by default.
        recompute_granularity: "full" keeps each block's input; "selective" also the outputs of its adapted linear
            layers, which then are not computed again. The gradients are the same, to the bit.
        mlp_chunk_tokens: the MLPs run by chunks of so many tokens, forward and backward; None or 0 for whole MLPs.
        block_rows: a larger batch goes through each block in chunks of so many rows, while its weights are in place
            once for all; a warning says where a model's blocks cannot take rows apart. None for whole batches.
        block_graphs: on a CUDA device, blocks are run by CUDA graphs, see ``blocks.graphs``. Not measured yet.
        head, embedding: "float" decodes the table into a plain frozen module, for code that trains it, changes its size
            or multiplies by it as a whole. It takes vocabulary x hidden size x the size of ``dtype``; over a float
            head, logits are computed. A float embedding to which the head is tied is the head's weight as well.

    Raises:
        ValueError: the store or its generation config is damaged, or an argument does not fit.
    """
    _check_choices(weights, checkpoints, recompute_granularity, head, embedding, block_rows, block_graphs)
    numerics, selective = _numerics(device, dtype, adapter_dtype, backend), recompute_granularity == "selective"
    player = device_player(numerics.device, selective) if block_graphs else None
    opened = open_store(store)
    config = read_store_config(opened)
    model = build_skeleton(config, numerics.dtype, attn_implementation)
    _take_generation_config(model, opened.directory)
    path, stack = find_blocks(model, blocks)
    adapters = None if lora is None else resolve_targets(as_lora_config(lora), model, opened, path)
    builder = Builder(opened, model, adapters, numerics, seed)
    placement = _Placement(opened, path, len(stack), weights, numerics.device)
    builder.fill(lambda modules: placement.place(modules, builder.experts))
    loss = builder.finish(config, block_rows)
    for module in (builder.head, *builder.modules.values()):
        module.borrowed = True
    _decode_tables(builder, head == "float", embedding == "float")
    _fuse_small_operations(stack, numerics)
    install_mlp_chunks(model, stack, mlp_chunk_tokens)
    inputs = block_input_store(checkpoints, Path(scratch_directory or tempfile.gettempdir()), placement.waiting)
    places = row_places(config, path, block_rows)
    engine = BlockEngine(stack, placement.pages, inputs, selective, placement.waiting, block_rows, places)
    engine.graphs = None if player is None else BlockGraphs(engine.blocks, player)
    watch_training(model, path, engine)
    # Another model may be loaded with these settings, where "all-linear" stands for other layers.
    adapters = None if adapters is None else dataclasses.replace(adapters, layers=None)
    model.mebp = Runtime(opened, engine, loss, adapters, numerics.device, backend)
    _adapt_to_trainers(model)
    return model


def _check_choices(
    weights: Residency,
    checkpoints: Residency,
    granularity: Granularity,
    head: str,
    embedding: str,
    block_rows: int | None,
    block_graphs: bool,
) -> None:
    check_residency("weights", weights)
    check_residency("checkpoints", checkpoints)
    if granularity not in GRANULARITIES:
        raise ValueError(f"recompute_granularity must be {' or '.join(GRANULARITIES)}, got {granularity!r}")
    for name, value in (("head", head), ("embedding", embedding)):
        if value not in ("int4", "float"):
            raise ValueError(f"{name} must be int4 or float, got {value!r}")
    check_block_rows(block_rows)
    if not isinstance(block_graphs, bool):
        raise ValueError(f"block_graphs must be True or False, got {block_graphs!r}")


def _numerics(
    device: torch.device | str, dtype: torch.dtype | str, adapter_dtype: torch.dtype, backend: str
) -> Numerics:
    """Puts the arguments of ``load`` together. ValueError where one does not fit."""
    check_adapter_dtype(adapter_dtype)
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        dtype = named
    device = torch.device(device)
    resolve_backend(backend, device)
    return Numerics(device, dtype, adapter_dtype, backend)


def _fuse_small_operations(stack: torch.nn.Module, numerics: Numerics) -> None:
    device, dtype = numerics.device.type, numerics.dtype
    backend = resolve_backend(numerics.backend, numerics.device, dtype)
    if has_kernels(backend, device, dtype):
        install_fused_operations(stack, device, dtype, backend=backend)


def _take_generation_config(model: Any, directory: Path) -> None:
    """Gives ``model`` the store's generation config, as ``from_pretrained`` does: where chats end, how to sample."""
    path = directory / "generation_config.json"
    if model.can_generate() and path.exists():
        with one_line(f"{path} is not a usable generation config", "compare it with the model's original"):
            model.generation_config = type(model.generation_config).from_pretrained(directory)


class _Placement:
    """Puts a store's weights where ``weights`` says: block by block, and the tables by their rows.

    Attributes:
        pages: per block, to be entered while its weights are needed.
        waiting: counts the time that is spent waiting for files.
    """

    def __init__(self, store: Store, path: str, blocks: int, weights: Residency, device: torch.device) -> None:
        self.store, self.weights, self.device = store, weights, device
        self.blocks = {f"{path}.{index}.": block_file(index) for index in range(blocks)}
        self.waiting = Waiting()
        self.pages: list[Pages] = []
        self.stager = None
        if device.type != "cpu" and weights != "device":
            largest = max(store.files[file].data().numel() for file in self.blocks.values())
            self.stager = Stager(device, self.waiting, largest)

    def place(self, modules: dict[str, Int4Module], experts: Mapping[str, ExpertPlaces]) -> None:
        """Puts the weights of ``modules`` and ``experts``, all int4 modules of the model by name, in place."""
        outside = dict(modules)
        for prefix, file in self.blocks.items():
            inside = {name: outside.pop(name) for name in modules if name.startswith(prefix)}
            mixtures = [places for name, places in experts.items() if name.startswith(prefix)]
            self.pages.append(self._place(file, inside, self.weights, self.stager, mixtures))
        if self.weights == "file" or self.stager is not None:
            self._place_by_rows(outside)
        else:
            self._place(SHARED, outside, "device", None)
        self.store.drop()  # what the float parameters were copied from

    def _place(
        self,
        file: str,
        modules: dict[str, Int4Module],
        weights: Residency,
        stager: Stager | None,
        experts: Sequence[ExpertPlaces] = (),
    ) -> Pages:
        return place_weights(self.store, file, modules, weights, self.device, stager, self.waiting, experts)

    def _place_by_rows(self, modules: dict[str, Int4Module]) -> None:
        """Leaves the embedding and the head where their rows are. Linear layers outside of any block are resident."""
        tables = {name: module for name, module in modules.items() if isinstance(module, Int4Table)}
        shared = self.store.files[SHARED]
        if linear := modules.keys() - tables.keys():
            shared.verify()
            for name in linear:
                modules[name].set_int4(self.store.weight(name).to(self.device, copy=True))
            shared.mapped.drop()
        host = host_copy(shared, self.device) if self.weights == "host" else None
        for name, table in tables.items():
            table.rows = StoredRows(self.store, name, self.device, self.stager, self.waiting, host)
            table.device = self.device
            # On a device the table keeps shapes alone: its rows come one by one.
            table.set_int4(self.store.weight(name) if self.device.type == "cpu" else self.store.weight(name).to("meta"))


def _decode_tables(builder: Builder, head: bool, embedding: bool) -> None:
    """Turns the head and the embedding into plain float modules, where that is asked for."""
    shared = restore_embedding(builder.model.get_input_embeddings()) if embedding else None
    if head or (embedding and builder.tied):
        builder.swap(builder.head_name, builder.head.decoded(shared if builder.tied else None))


def _adapt_to_trainers(model: Any) -> None:
    """Makes ``model`` fit for trainers, which checkpoint, tie, save and share the models that they are given."""
    model.gradient_checkpointing_enable = _no_second_checkpointing
    tables = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    int4 = [name for name, table in tables.items() if isinstance(table, Int4Table)]
    if int4:
        model.tie_weights = functools.partial(_tied_already, model)
        model._resize_token_embeddings = functools.partial(_refuse_other_sizes, tables["embedding"], int4)
    if (base := model.mebp.store.base) is not None:
        model.name_or_path = base.name_or_path  # which PEFT writes into the configs of its adapters
    install_saving(model)
    ignore_in_ddp(model)


def _no_second_checkpointing(*args: Any, **kwargs: Any) -> None:
    """Changes nothing: the blocks are checkpointed already."""


def _refuse_other_sizes(
    embedding: Any, int4: list[str], new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any
) -> Any:
    """Stands for transformers' ``_resize_token_embeddings``. ValueError where the size would change."""
    rows = embedding.weight.shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows:
        raise ValueError(
            f"an int4 {' and '.join(int4)} of {rows} tokens cannot get {wanted}: use load(..., head='float', "
            f"embedding='float') and train the new rows by PEFT, or resize the float model and quantize that"
        )
    return embedding


def _tied_already(model: Any, *args: Any, **kwargs: Any) -> None:
    """Changes nothing: a tied head reads the embedding's rows, and has no parameter. lm-eval asks for it again.

    ValueError where the embedding has been replaced since, and the head should follow.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and isinstance(head, Int4Head) and type(embedding) is torch.nn.Embedding:
        raise ValueError(
            "an int4 head cannot be tied to another embedding: use load(..., embedding='float'), which ties both"
        )
