"""The first blocks of a model run without data, to count the bytes that a step takes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.mlp_chunks import chunk_mlp
from mebp_triton.blocks.options import Granularity
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.kernels.cross_entropy import VOCABULARY_TILE
from mebp_triton.kernels.panel import CPU_ELEMENTS, GPU_ELEMENTS, Workspace
from mebp_triton.kernels.tables import DTYPES as COMPUTE_DTYPES
from mebp_triton.layers.int4_module import Int4Module, Int4Table
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.build import Builder, Numerics, check_targets
from mebp_triton.models.discover import find_mlps
from mebp_triton.models.skeleton import build_skeleton, int4_sites, linear_names
from mebp_triton.store.block_inputs import BlockInput, BlockInputStore, DeviceBlockInputs, HostBlockInputs
from mebp_triton.store.manifest import block_file
from mebp_triton.store.residency import Residency
from mebp_triton.store.table_rows import StoredRows
from mebp_triton.store.waiting import Waiting
from mebp_triton.training.optimizers.adamw import BlockAdamW, block_groups
from mebp_triton.training.run_settings import RunSettings

from .inventory import Inventory, ShapesOnly
from .live_bytes import LiveBytes, traced


class _Counted:
    """A block input store that counts the bytes that wait in it.

    Attributes:
        waiting: bytes now. saved: of every tensor, in order.
    """

    def __init__(self, store: BlockInputStore) -> None:
        self.store = store
        self.waiting, self.saved = 0, []  # type: ignore[var-annotated]

    def save(self, tensor: Tensor) -> BlockInput:
        block_input = self.store.save(tensor)
        self.saved.append(tensor.nbytes)
        self.waiting += tensor.nbytes
        weakref.finalize(block_input, self._gone, tensor.nbytes)
        return block_input

    def _gone(self, size: int) -> None:
        self.waiting -= size


class _Elsewhere:
    """Block inputs that wait in no memory. It allocates what ``FileBlockInputs`` does while it writes and reads."""

    def save(self, tensor: Tensor) -> BlockInput:
        tensor.detach().contiguous()
        return _Away(tensor.shape, tensor.dtype)


@dataclass(eq=False)
class _Away:
    shape: torch.Size
    dtype: torch.dtype

    def load(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Traced:
    """Bytes of a step beyond weights, parameters, gradients and what waits for the backward pass.

    Attributes:
        forward, loss, backward, optimizer: the highest of that part of a step.
        rest: between steps (buffers that are kept).
        checkpoint, outputs: per block that was traced, the input and the outputs of layers that wait.
        kept_to_the_end: whether they are there until the whole backward pass is over.
    """

    forward: int
    loss: int
    backward: int
    optimizer: int
    rest: int
    checkpoint: tuple[int, ...]
    outputs: tuple[int, ...]
    kept_to_the_end: bool


class TracedModel:
    """The first blocks of a model, as many as have one of every kind, ready to run without data.

    Args:
        inventory: of the whole model's store.
        config: transformers'.
        settings: of the run.
    """

    def __init__(self, inventory: Inventory, config: Any, settings: RunSettings) -> None:
        self.settings, self.config = settings, config
        self.mlps: list[str] | None = None
        self.dtype = COMPUTE_DTYPES[settings.dtype]
        self.model = build_skeleton(copy.deepcopy(config), self.dtype)
        path, stack = find_blocks(self.model)
        lora = settings.lora()
        self.kinds = _kinds(stack, path, config, lora)
        self.depth = max(min(len(stack), 2), max(self.kinds.index(kind) for kind in set(self.kinds)) + 1)
        check_targets(lora, linear_names(int4_sites(self.model)[0]), self.model)
        inventory = inventory.part({block_file(index) for index in range(self.depth, len(stack))})
        del stack[self.depth :]
        self.stack, self.path = stack, path
        # A device's panels are larger. Those of torch's own operations stand for its kernels' ones.
        self.live = LiveBytes(Workspace(CPU_ELEMENTS if settings.device == "cpu" else GPU_ELEMENTS))
        self.results: dict[Any, Traced] = {}
        store: Any = ShapesOnly(inventory, "the model")
        numerics = Numerics(torch.device("cpu"), self.dtype, backend="panel")
        builder = Builder(store, self.model, lora, numerics, settings.seed)
        with traced(self.live):
            builder.fill(lambda modules: self._place_tables(store, modules))
        builder.finish(config)
        self.tables = {name for name, module in builder.modules.items() if isinstance(module, Int4Table)}
        self.model.train()
        self.base = self.live.live

    def _place_tables(self, store: Any, modules: dict[str, Int4Module]) -> None:
        """Reads the embedding and the head by their rows where the run leaves weights in their file."""
        if self.settings.weights == "file":
            for name, module in modules.items():
                if isinstance(module, Int4Table):
                    module.rows = _rows(store, name)

    def run(self, granularity: Granularity, checkpoints: Residency, chunk: int) -> Traced:
        """One step."""
        key = granularity, checkpoints, chunk
        if key not in self.results:
            with self._chunked(chunk), traced(self.live):
                self.results[key] = self._step(granularity, checkpoints)
        return self.results[key]

    @contextmanager
    def _chunked(self, tokens: int) -> Iterator[None]:
        """Within, the MLPs run by chunks; see ``install_mlp_chunks``."""
        if tokens and self.mlps is None:
            inside = {name for name, _ in self.model.named_modules()}
            try:
                self.mlps = [path for path in find_mlps(self.config, self.path) if path in inside]
            except ValueError:  # then they run whole, as a warning says when the model is loaded
                self.mlps = []
        mlps = [self.model.get_submodule(path) for path in self.mlps or [] if tokens]
        kinds = [type(mlp) for mlp in mlps]
        for mlp in mlps:
            chunk_mlp(mlp, tokens)
        try:
            yield
        finally:
            for mlp, kind in zip(mlps, kinds, strict=True):
                mlp.__class__ = kind

    def _step(self, granularity: Granularity, checkpoints: Residency) -> Traced:
        on_host = self.settings.device == "cpu"
        places: dict[Residency, BlockInputStore] = {
            "device": DeviceBlockInputs(),
            "host": HostBlockInputs() if on_host else _Elsewhere(),
            "file": _Elsewhere(),
        }
        waiting, live = _Counted(places[checkpoints]), self.live
        engine = BlockEngine(self.stack, None, waiting, granularity == "selective")
        phases: dict[str, list[int]] = {"forward": [], "backward": []}
        counts: list[int] = []
        base = self.base
        in_memory = checkpoints == "device" or (checkpoints == "host" and on_host)
        gradients = [sum(parameter.nbytes for parameter in engine.trainable(index)) for index in range(self.depth)]

        def observe(event: str, index: int) -> None:
            waits = waiting.waiting if in_memory else 0
            if event == "backward":
                waits += sum(gradients[index:])
            phases[event].append(live.restart() - base - waits)
            counts.append(len(waiting.saved))

        engine.observer = observe
        groups = block_groups(self.model, engine)
        mezo = self.settings.optim == "mezo"
        try:
            live.restart()
            with torch.no_grad() if mezo else nullcontext():
                output = self.model(**self._batch(), use_cache=False)
            loss = live.restart() - base - (waiting.waiting if in_memory else 0)
            if not mezo:
                output.loss.backward()
            held = waiting.waiting
            tail = live.restart() - base - (0 if mezo else sum(gradients)) - (held if in_memory else 0)
            del output
            rest = live.live - base - (0 if mezo else sum(gradients))
            optimizer = (
                max(parameter.nbytes for group in groups for parameter in group) if mezo else self._optimize(groups)
            )
        finally:
            engine.remove()
            for group in groups:
                for parameter in group:
                    parameter.grad = None
        starts = [0, *counts[: self.depth - 1]]
        spans = list(zip(starts, counts, strict=False))  # a block below the lowest adapted one saves nothing
        inputs = tuple(waiting.saved[start] if stop > start else 0 for start, stop in spans)
        outputs = tuple(sum(waiting.saved[start + 1 : stop]) for start, stop in spans)
        backward = max([*phases["backward"], tail]) if not mezo else 0
        kept_to_the_end = held > inputs[0] + outputs[0]
        return Traced(max(phases["forward"]), loss, backward, optimizer, rest, inputs, outputs, kept_to_the_end)

    def _batch(self) -> dict[str, Tensor]:
        """As ``collate`` makes it. One row has no padding, and a model is told so by a mask that it need not use."""
        shape = self.settings.per_device_train_batch_size, self.settings.max_length
        batch = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "labels", "attention_mask")}
        if self.settings.packing:
            batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)  # all documents apart: a mask is made
        if shape[0] == 1 or self.settings.packing:
            del batch["attention_mask"]
        return batch

    def _optimize(self, groups: list[list[nn.Parameter]]) -> int:
        """What clipping and an optimizer step need beyond gradients and moments."""
        optimizer = BlockAdamW(groups, eight_bit=self.settings.optim == "adamw_8bit")
        moments = sum(buffer.nbytes for buffer in optimizer.moments.buffers)
        self.live.restart()
        before = self.live.live
        torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group], 1.0)
        optimizer.step(selected=None if self.settings.selection_mode == "full" else frozenset())
        assert moments <= before
        return self.live.restart() - before


def _rows(store: Any, name: str) -> StoredRows:
    """A table's rows in a file, in the segments in which they are walked."""

    rows = StoredRows(store, name, torch.device("cpu"), None, Waiting(), None)
    rows.spans = [(0, min(2 * VOCABULARY_TILE, rows.spans[-1][1]))]  # a tile is like another
    return rows


def _kinds(stack: nn.ModuleList, path: str, config: Any, lora: LoraConfig) -> list[Any]:
    """What tells blocks apart: modules and shapes, the type of layer that the config gives them, what is adapted."""
    types = getattr(config.get_text_config(), "layer_types", None) or [None] * len(stack)
    return [
        (
            repr(block),
            kind,
            tuple(name for name, _ in block.named_modules() if lora.targets(f"{path}.{index}.{name}")),
        )
        for index, (block, kind) in enumerate(zip(stack, types, strict=False))
    ]
