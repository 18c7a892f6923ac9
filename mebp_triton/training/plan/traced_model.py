"""Runs the first blocks of a model without data, to count the bytes that a step takes."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.mlp_chunks import chunk_mlp
from mebp_triton.blocks.options import Granularity
from mebp_triton.blocks.row_chunks import RowPlaces
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.kernels.cross_entropy import VOCABULARY_TILE
from mebp_triton.kernels.tables import DTYPES as COMPUTE_DTYPES
from mebp_triton.layers.int4_module import Int4Module, Int4Table
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.build import Builder, Numerics
from mebp_triton.models.discover import find_mlps
from mebp_triton.models.fused_operations import install_fused_operations
from mebp_triton.models.operation_kernels import has_kernels
from mebp_triton.models.row_places import find_row_places
from mebp_triton.models.skeleton import build_skeleton, int4_sites
from mebp_triton.models.targets import resolve_targets
from mebp_triton.store.block_inputs import BlockInputStore, DeviceBlockInputs, HostBlockInputs
from mebp_triton.store.manifest import block_file
from mebp_triton.store.residency import Residency
from mebp_triton.store.table_rows import StoredRows
from mebp_triton.store.waiting import Waiting
from mebp_triton.training.optimizers.adamw import block_groups
from mebp_triton.training.optimizers.table import OPTIMIZERS
from mebp_triton.training.run_settings import RunSettings

from .inventory import Inventory, ShapesOnly
from .live_bytes import counter_of, traced
from .stand_ins import AnyExperts, Counted, Elsewhere

MOST_JOINED = 8  # micro-batches that are traced together; a trace takes some tenths of a second for each


@dataclass(frozen=True)
class Traced:
    """Bytes of a step beyond weights, parameters, gradients and what waits for the backward pass.

    Attributes:
        forward, loss, backward, optimizer: the peak of that part of a step.
        rest: what stays between steps, which are buffers.
        block_input, outputs: for every block that was traced, its input and the outputs of its layers that wait.
        largest_waiting: the largest tensor among them.
        kept_to_the_end: whether these are freed only when the whole backward pass is over.
    """

    forward: int
    loss: int
    backward: int
    optimizer: int
    rest: int
    block_input: tuple[int, ...]
    outputs: tuple[int, ...]
    largest_waiting: int
    kept_to_the_end: bool


class TracedModel:
    """The first blocks of a model, as many as it takes to have one of every kind, ready to run without data.

    Args:
        inventory: the tensors of the whole model's store.
        config: the model's config, as transformers reads it.
        settings: the settings of the run; only those of ``TRACED_BY`` matter.

    Attributes:
        kinds: what tells the blocks of the whole model apart, one per block.
        depth: how many blocks are traced.
        lora: the adapter's settings, without layers that text never reaches.
        tables: names of the embedding and the head.
        expert_parameters: the parameter that each matrix of an expert lies in, of the whole model.
        experts: the experts of mixtures, by the path of their module; they know what was traced of them.
        base: live bytes between steps, before the first one.

    Raises:
        ValueError: a target of the adapter matches no layer.
    """

    def __init__(self, inventory: Inventory, config: Any, settings: RunSettings) -> None:
        self.settings, self.config = settings, config
        self.mlps: list[str] | None = None
        self.row_places: Sequence[RowPlaces] | None = None
        self.dtype = COMPUTE_DTYPES[settings.dtype]
        self.model = build_skeleton(copy.deepcopy(config), self.dtype)
        path, stack = find_blocks(self.model)
        with warnings.catch_warnings():  # ``load`` warns when the run begins
            warnings.simplefilter("ignore")
            lora = self.lora = resolve_targets(settings.lora(), self.model, inventory, path)
        sites, _ = int4_sites(self.model, inventory)
        self.expert_parameters = {site.name: site.parameter for site in sites if site.role == "expert"}
        self.kinds = _kinds(stack, path, config, lora)
        self.depth = max(min(len(stack), 2), max(self.kinds.index(kind) for kind in set(self.kinds)) + 1)
        inventory = inventory.part({block_file(index) for index in range(self.depth, len(stack))})
        del stack[self.depth :]
        self.stack, self.path = stack, path
        self.live, backend = counter_of(settings.device, self.dtype, settings.backend)
        self.results: dict[Any, Traced] = {}
        store: Any = ShapesOnly(inventory, "the model")
        numerics = Numerics(torch.device("cpu"), self.dtype, backend=backend)
        with warnings.catch_warnings():  # as above
            warnings.simplefilter("ignore")
            builder = Builder(store, self.model, lora, numerics, settings.seed)
        with traced(self.live):
            builder.fill(lambda modules: self._place_tables(store, modules))
            self.experts = {path: AnyExperts(places, store) for path, places in builder.experts.items()}
        self.loss = builder.finish(config)
        if has_kernels(backend, settings.device, self.dtype):
            install_fused_operations(stack, "cpu", self.dtype, FakeTensor, backend)
        self.tables = {name for name, module in builder.modules.items() if isinstance(module, Int4Table)}
        self.model.train()
        self.base = self.live.live

    def _place_tables(self, store: Any, modules: dict[str, Int4Module]) -> None:
        """Reads the embedding and the head by their rows where the run leaves weights in their file."""
        if self.settings.weights == "file":
            for name, module in modules.items():
                if isinstance(module, Int4Table):
                    module.rows = _rows(store, name)

    def run(self, granularity: Granularity, checkpoints: Residency, chunk: int, joined: int = 1) -> Traced:
        """Traces one step; the same arguments get the same result.

        Args:
            granularity, checkpoints: as the settings ``recompute_granularity`` and ``checkpoints``.
            chunk: as ``mlp_chunk_tokens``.
            joined: how many micro-batches go through the blocks together.
        """
        joined = joined if joined > 1 and self._find_row_places() else 1
        key = granularity, checkpoints, chunk, joined
        if joined > MOST_JOINED:
            half, whole = (
                self.run(granularity, checkpoints, chunk, count) for count in (MOST_JOINED // 2, MOST_JOINED)
            )
            return _extended(half, whole, joined)
        if key not in self.results:
            with self._chunked(chunk), traced(self.live):
                self.results[key] = self._step(granularity, checkpoints, joined)
        return self.results[key]

    def _find_row_places(self) -> bool:
        """Finds where blocks have the rows of a batch. Whether they can be told apart; see ``row_places``."""
        if self.row_places is None:
            try:
                self.row_places = find_row_places(self.config, self.path)
            except ValueError:  # then micro-batches are not joined, as a warning says when the model is loaded
                self.row_places = []
        return bool(self.row_places)

    @contextmanager
    def _chunked(self, tokens: int) -> Iterator[None]:
        """While active, the MLPs run by chunks of ``tokens`` tokens, or whole for 0; see ``install_mlp_chunks``."""
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

    def _step(self, granularity: Granularity, checkpoints: Residency, joined: int) -> Traced:
        """Traces one step. Gradients and what waits are taken off every peak: ``Sizes`` adds those of all blocks."""
        on_host, has_backward = self.settings.device == "cpu", OPTIMIZERS[self.settings.optim].gradients
        stores: dict[Residency, BlockInputStore] = {
            "device": DeviceBlockInputs(),
            "host": HostBlockInputs() if on_host else Elsewhere(),
            "file": Elsewhere(),
        }
        waiting, live = Counted(stores[checkpoints]), self.live
        in_memory = checkpoints == "device" or (checkpoints == "host" and on_host)
        rows = self.settings.per_device_train_batch_size if joined > 1 else None
        engine = BlockEngine(
            self.stack,
            block_inputs=waiting,
            keep_outputs=granularity == "selective",
            block_rows=rows,
            row_places=self.row_places,
        )
        self.loss.rows = rows
        gradients = [sum(parameter.nbytes for parameter in engine.trainable(index)) for index in range(self.depth)]
        all_gradients = sum(gradients) if has_backward else 0
        peaks: dict[str, list[int]] = {"forward": [], "backward": []}
        saved_after: list[int] = []  # how many tensors wait after each block's forward pass

        def next_peak(gradients: int) -> int:
            waits = waiting.bytes if in_memory else 0
            return live.restart() - self.base - waits - gradients

        def observe(event: str, index: int) -> None:
            # The backward pass goes downwards: the blocks from ``index`` on have their gradients.
            peaks[event].append(next_peak(sum(gradients[index:]) if event == "backward" else 0))
            saved_after.append(len(waiting.saved))

        engine.observer = observe
        groups = block_groups(self.model, engine)
        try:
            live.restart()
            with nullcontext() if has_backward else torch.no_grad():
                output = self.model(**self._batch(joined), use_cache=False)
            loss = next_peak(0)
            if has_backward:
                output.loss.backward()
            left = waiting.bytes
            below_blocks = next_peak(all_gradients)
            del output
            rest = live.live - self.base - all_gradients
            optimizer = self._optimize(groups)
        finally:
            engine.remove()
            for group in groups:
                for parameter in group:
                    parameter.grad = None
        starts = [0, *saved_after[: self.depth - 1]]
        spans = list(zip(starts, saved_after, strict=False))  # a block below the lowest adapted one saves nothing
        # Each micro-batch saves its own block input first, and they are of one size.
        inputs = tuple(joined * waiting.saved[start] if stop > start else 0 for start, stop in spans)
        outputs = tuple(
            sum(waiting.saved[start:stop]) - size for (start, stop), size in zip(spans, inputs, strict=False)
        )
        backward = max([*peaks["backward"], below_blocks]) if has_backward else 0
        kept_to_the_end = left > inputs[0] + outputs[0]
        forward, largest = max(peaks["forward"]), max(waiting.saved, default=0)
        return Traced(forward, loss, backward, optimizer, rest, inputs, outputs, largest, kept_to_the_end)

    def _batch(self, joined: int) -> dict[str, Tensor]:
        """A batch as ``collate`` makes it. One row alone has no padding, so it comes without a mask."""
        shape = joined * self.settings.per_device_train_batch_size, self.settings.max_length
        batch = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "labels", "attention_mask")}
        if self.settings.packing:
            batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)  # every token a document: a mask is made
        if shape[0] == 1 or self.settings.packing:
            del batch["attention_mask"]
        return batch

    def _optimize(self, groups: list[list[nn.Parameter]]) -> int:
        """Bytes that clipping and an optimizer step need beyond gradients and state."""
        facts, parameters = OPTIMIZERS[self.settings.optim], [parameter for group in groups for parameter in group]
        if facts.make is None:
            return max(parameter.nbytes for parameter in parameters)
        optimizer = facts.make(groups)
        self.live.restart()
        before = self.live.live
        if facts.gradients:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(selected=None if self.settings.selection_mode == "full" else frozenset())
        return self.live.restart() - before


def _extended(half: Traced, whole: Traced, joined: int) -> Traced:
    """What ``joined`` micro-batches take, from what MOST_JOINED and half of them do: each one more takes as much."""

    def extend(small: Any, large: Any) -> Any:
        if isinstance(large, tuple):
            return tuple(map(extend, small, large))
        if isinstance(large, bool):
            return large
        return large + (large - small) * (joined - MOST_JOINED) * 2 // MOST_JOINED

    return Traced(*map(extend, dataclasses.astuple(half), dataclasses.astuple(whole)))


def _rows(store: Any, name: str) -> StoredRows:
    """The rows of a table that stays in its file, of which two tiles of the vocabulary are walked."""
    rows = StoredRows(store, name, torch.device("cpu"), None, Waiting(), None)
    rows.spans = [(0, min(2 * VOCABULARY_TILE, rows.spans[-1][1]))]  # the other tiles take as much
    return rows


def _kinds(stack: nn.ModuleList, path: str, config: Any, lora: LoraConfig) -> list[Any]:
    """Returns a key for each block; blocks with equal keys have the same modules, shapes, layer type and adapters."""
    types = getattr(config.get_text_config(), "layer_types", None) or [None] * len(stack)
    return [
        (
            repr(block),
            kind,
            tuple(name for name, _ in block.named_modules() if lora.targets(f"{path}.{index}.{name}")),
            tuple(name for name, _ in block.named_parameters() if lora.targets_parameter(f"{path}.{index}.{name}")),
        )
        for index, (block, kind) in enumerate(zip(stack, types, strict=False))
    ]
