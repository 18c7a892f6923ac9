"""What a training run will take at its peak, before anything is loaded, and settings that stay inside a budget.

A few blocks of the model are traced without data (``footprint``): every kind of block, forward, loss, backward,
optimizer step. What the others add is what waits in between: checkpoints, gradients, moments. The peak is the highest
of a step's moments.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import machine, memory
from .allocator import return_free_memory
from .backprop import BlockEngine
from .blocks import find_blocks
from .config import TrainConfig, parse_size
from .footprint import LiveBytes, traced
from .kernels.cross_entropy import VOCABULARY_TILE
from .kernels.layout import Int4Weight, group_count, padded
from .kernels.panel import PANEL_ELEMENTS, PANEL_ELEMENTS_DEFAULT
from .kernels.tables import DTYPES as COMPUTE_DTYPES
from .lora import Int4Module, Int4Table, LoraConfig
from .loss import install_loss
from .model import Builder, check_targets
from .optim import BlockAdamW, block_groups
from .recompute import Granularity
from .selection import select_blocks
from .siblings import join_siblings
from .skeleton import build_skeleton, float_names, int4_sites
from .stores.checkpoints import Checkpoint, CheckpointStore, DeviceCheckpoints, HostCheckpoints, Residency
from .stores.format import SHARED, MatrixInfo, Store, block_file
from .stores.rows import SEGMENT_BYTES, SEGMENT_STEP, StoredRows
from .stores.waiting import Waiting
from .token_chunks import chunk_mlp, find_mlps

Shape = tuple[torch.dtype, tuple[int, ...]]


def nbytes(shape: Shape) -> int:
    return shape[0].itemsize * prod(shape[1])


# --- what a store holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inventory:
    """The tensors of a store, whether it exists already or not.

    Attributes:
        files: per file, its tensors' dtypes and shapes by name. sizes: per file, its bytes.
        matrices, floats, tied_head: as in ``Store``.
    """

    files: dict[str, dict[str, Shape]]
    sizes: dict[str, int]
    matrices: dict[str, MatrixInfo]
    floats: dict[str, str]
    tied_head: bool

    @classmethod
    def of_store(cls, store: Store) -> Inventory:
        files = {
            name: {tensor: (entry[0], entry[1]) for tensor, entry in file.entries.items()}
            for name, file in store.files.items()
        }
        sizes = {name: file.mapped.size for name, file in store.files.items()}
        return cls(files, sizes, store.matrices, store.floats, store.tied_head)

    @classmethod
    def of_config(cls, config: Any, scheme: str = "symmetric", group_size: int = 64) -> Inventory:
        """Of the store that ``quantize`` would make of a model with this config."""
        model = build_skeleton(copy.deepcopy(config), torch.float32)
        path, stack = find_blocks(model)
        sites, tied = int4_sites(model)
        files: dict[str, dict[str, Shape]] = {name: {} for name in (*map(block_file, range(len(stack))), SHARED)}
        matrices, floats = {}, {}

        def file_of(name: str) -> str:
            inside = name.startswith(path + ".")
            return block_file(int(name.removeprefix(path + ".").split(".")[0])) if inside else SHARED

        for site in sites:
            shape, file = (site.out_features, site.in_features), file_of(site.name)
            groups = (group_count(site.in_features, group_size), site.out_features)
            files[file][f"{site.name}.packed"] = torch.uint8, (site.out_features, padded(site.in_features) // 2)
            files[file][f"{site.name}.scales"] = torch.float16, groups
            if scheme == "affine":
                files[file][f"{site.name}.minimum"] = torch.float16, groups
            if scheme == "codebook":
                files[file][f"{site.name}.codebook"] = torch.float32, (16,)
            matrices[site.name] = MatrixInfo(file, scheme, shape, group_size, "F16", 0.0)
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
        for name in float_names(model, sites):
            floats[name] = file_of(name)
            files[floats[name]][name] = dtype, tuple(model.get_parameter(name).shape)
        sizes = {name: sum(map(nbytes, tensors.values())) for name, tensors in files.items()}
        return cls(files, sizes, matrices, floats, tied)

    def part(self, dropped: set[str]) -> Inventory:
        """Without the blocks whose files are ``dropped``."""
        matrices = {name: info for name, info in self.matrices.items() if info.file not in dropped}
        floats = {name: file for name, file in self.floats.items() if file not in dropped}
        return dataclasses.replace(self, matrices=matrices, floats=floats)


class _ShapesOnly:
    """Stands for a ``Store`` while a model is traced: tensors of the right shapes, none with bytes."""

    def __init__(self, inventory: Inventory, directory: str) -> None:
        self.inventory, self.directory = inventory, directory
        self.matrices, self.floats, self.tied_head = inventory.matrices, inventory.floats, inventory.tied_head
        self.files = {name: _NoFile(name, inventory.matrices) for name in inventory.files}

    def weight(self, name: str, source: Any = None) -> Int4Weight:
        info = self.matrices[name]
        shapes = self.inventory.files[info.file]
        parts = {
            part: torch.empty(shape, dtype=dtype)
            for part in ("packed", "scales", "minimum", "codebook")
            if (found := shapes.get(f"{name}.{part}")) is not None
            for dtype, shape in [found]
        }
        return Int4Weight(in_features=info.shape[1], group_size=info.group_size, **parts)

    def float_tensor(self, name: str) -> Tensor:
        dtype, shape = self.inventory.files[self.floats[name]][name]
        return torch.empty(shape, dtype=dtype)


class _NoFile:
    """Stands for a ``StoreFile`` and its mapping, of which nothing is read."""

    start = 0

    def __init__(self, name: str, matrices: Mapping[str, MatrixInfo]) -> None:
        self.entries = {f"{matrix}.packed": (torch.uint8, (), 0, 0) for matrix in matrices}
        self.mapped = self

    def verify(self) -> None:
        pass

    def populate(self, start: int = 0, stop: int = 0) -> None:
        pass

    read_ahead = drop = populate


# --- the trace ------------------------------------------------------------------------------------------------------


class _Counted:
    """A checkpoint store that counts the bytes which wait in it.

    Attributes:
        waiting: bytes now. saved: of every tensor, in order.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.waiting, self.saved = 0, []  # type: ignore[var-annotated]

    def save(self, tensor: Tensor) -> Checkpoint:
        checkpoint = self.store.save(tensor)
        self.saved.append(tensor.nbytes)
        self.waiting += tensor.nbytes
        weakref.finalize(checkpoint, self._gone, tensor.nbytes)
        return checkpoint

    def _gone(self, size: int) -> None:
        self.waiting -= size


class _Elsewhere:
    """Checkpoints that wait in no memory: what ``FileCheckpoints`` needs of it while it writes and reads."""

    def save(self, tensor: Tensor) -> Checkpoint:
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
        settings: resolved.
    """

    def __init__(self, inventory: Inventory, config: Any, settings: TrainConfig) -> None:
        self.settings, self.config = settings, config
        self.mlps: list[str] | None = None
        self.dtype = COMPUTE_DTYPES[settings.dtype or "float32"]
        self.model = build_skeleton(copy.deepcopy(config), self.dtype)
        path, stack = find_blocks(self.model)
        lora = lora_config(settings)
        self.kinds = _kinds(stack, path, config, lora)
        self.depth = max(min(len(stack), 2), max(self.kinds.index(kind) for kind in set(self.kinds)) + 1)
        every = inventory.matrices
        inventory = inventory.part({block_file(index) for index in range(self.depth, len(stack))})
        others = list(stack[self.depth :])
        del stack[self.depth :]
        self.stack, self.path = stack, path
        self.live = LiveBytes()
        self.results: dict[Any, Traced] = {}
        store: Any = _ShapesOnly(inventory, "the model")
        with self._tracing():
            cpu = torch.device("cpu")
            builder = Builder(store, self.model, lora, cpu, self.dtype, torch.float32, "panel", settings.seed)
            replaced, self.head = builder.replace_modules()
            builder.place_floats()
            for name, module in replaced.items():
                if settings.weights == "file" and isinstance(module, Int4Table):
                    module.rows = _rows(store, name)
            if inventory.tied_head:
                self.head.rows = self.model.get_input_embeddings().rows
        self.tables = {name for name, module in replaced.items() if isinstance(module, Int4Table)}
        adapted = [name for name in every if name not in self.tables and lora.targets(name)]
        check_targets(lora, adapted, type(self.model).__name__)
        stack.extend(others)  # layers that share inputs are looked for in the whole model
        join_siblings(self.model, config)
        del stack[self.depth :]
        install_loss(self.model, self.head)
        self.model.train()
        self.base = self.live.live

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        # A device's panels are larger. Those of torch's own operations then stand for its kernels' ones.
        elements = PANEL_ELEMENTS if self.settings.device == "cpu" else {"cpu": PANEL_ELEMENTS_DEFAULT}
        with mock.patch.dict(PANEL_ELEMENTS, elements), traced(self.live):
            yield

    def run(self, granularity: Granularity, checkpoints: Residency, chunk: int) -> Traced:
        """One step."""
        key = granularity, checkpoints, chunk
        if key not in self.results:
            with self._chunked(chunk), self._tracing():
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
        places: dict[Residency, CheckpointStore] = {
            "device": DeviceCheckpoints(),
            "host": HostCheckpoints() if on_host else _Elsewhere(),
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
        inputs = tuple(waiting.saved[start] for start in starts) if not mezo else (0,) * self.depth
        outputs = tuple(sum(waiting.saved[start + 1 : stop]) for start, stop in zip(starts, counts, strict=False))
        backward = max([*phases["backward"], tail]) if not mezo else 0
        kept_to_the_end = held > inputs[0] + outputs[0]
        return Traced(max(phases["forward"]), loss, backward, optimizer, rest, inputs, outputs, kept_to_the_end)

    def _batch(self) -> dict[str, Tensor]:
        """As ``collate`` makes it. One row has no padding, and a model is told so by a mask that it need not use."""
        shape = self.settings.per_device_train_batch_size, self.settings.max_length
        batch = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "labels", "attention_mask")}
        if shape[0] == 1:
            del batch["attention_mask"]
        return batch

    def _optimize(self, groups: list[list[nn.Parameter]]) -> int:
        """What clipping and an optimizer step need beyond gradients and moments."""
        optimizer = BlockAdamW(groups)
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


def lora_config(settings: TrainConfig) -> LoraConfig:
    """The adapter that the settings describe."""
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.targets(),
        use_rslora=settings.use_rslora,
    )


# --- the plan -------------------------------------------------------------------------------------------------------

COMPONENTS = (
    "framework",
    "weights of blocks",
    "other weights",
    "float parameters",
    "LoRA",
    "gradients",
    "optimizer state",
    "checkpoints",
    "kept outputs",
    "activations",
    "loss",
    "allocator",
)


@dataclass(frozen=True)
class Moment:
    """A moment of a step, and the bytes that every component has then."""

    name: str
    components: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class Plan:
    """The predicted memory of a run.

    Attributes:
        settings: what it is predicted for, resolved.
        host: the process's resident set at the moments of a step.
        device: what the device's allocator has given out then; empty on a CPU.
        shared: whether the device's memory is the host's, so that both count together.
        files: bytes on disk: the store, checkpoints, optimizer state.
    """

    settings: TrainConfig
    host: tuple[Moment, ...]
    device: tuple[Moment, ...]
    shared: bool
    files: dict[str, int]

    @property
    def host_peak(self) -> Moment:
        return max(self.host, key=lambda moment: moment.total)

    @property
    def device_peak(self) -> Moment | None:
        return max(self.device, key=lambda moment: moment.total, default=None)

    @property
    def peak(self) -> int:
        """What a memory budget limits: the device's memory, or the resident set where there is none; both if shared."""
        device = self.device_peak
        if device is None:
            return self.host_peak.total
        return device.total + (self.host_peak.total if self.shared else 0)


class CannotTrace(ValueError):
    """A model's own code does not run without data."""


class Planner:
    """Predicts for one model; what was traced is kept.

    Args:
        inventory: of the model's store.
        config: transformers'.
        framework: the resident set of a process that has imported what trains and trained nothing yet; by default
            this one's after the first trace.
    """

    def __init__(self, inventory: Inventory, config: Any, framework: int | None = None) -> None:
        self.inventory, self.config, self._framework = inventory, config, framework
        self.models: dict[Any, TracedModel] = {}

    @property
    def framework(self) -> int:
        if self._framework is None:
            return_free_memory()
            self._framework = memory.resident().total
        return self._framework

    def traced(self, settings: TrainConfig) -> tuple[TracedModel, Traced]:
        key = tuple(getattr(settings, name) for name in TRACED_BY)
        granularity = settings.recompute_granularity or "selective"
        try:
            if key not in self.models:
                self.models[key] = TracedModel(self.inventory, self.config, settings)
            model = self.models[key]
            return model, model.run(granularity, settings.checkpoints or "device", settings.mlp_chunk_tokens or 0)
        except ValueError:
            raise
        except Exception as error:  # a model's own code may raise anything
            reason = (str(error).splitlines() or [""])[0]
            kind = self.config.model_type
            raise CannotTrace(f"a model of type {kind} cannot be traced: {type(error).__name__}: {reason}") from error

    def predict(self, settings: TrainConfig) -> Plan:
        """``settings``: resolved."""
        model, step = self.traced(settings)
        sizes = _Sizes(self.inventory, model, step, settings)
        if settings.device == "cpu":
            host = _moments(sizes, step, settings, "cpu", self.framework)
            return Plan(settings, host, (), False, sizes.files)
        device = torch.device(settings.device or "cuda")
        on_device = _moments(sizes, step, settings, "cuda", 0)
        return Plan(
            settings, _beside(sizes, settings, self.framework), on_device, machine.is_unified(device), sizes.files
        )

    def default(self, settings: TrainConfig) -> TrainConfig:
        """``settings`` resolved, the granularity too: selective if what is kept takes half of what is free."""
        resolved = settings.resolved()
        if resolved.recompute_granularity is not None or resolved.optim == "mezo":
            return dataclasses.replace(resolved, recompute_granularity=resolved.recompute_granularity or "full")
        selective = dataclasses.replace(resolved, recompute_granularity="selective")
        model, step = self.traced(selective)
        kept = _Sizes(self.inventory, model, step, selective).kept
        free = machine.available_memory_bytes()
        if resolved.checkpoints == "device" and resolved.device != "cpu":
            free = torch.cuda.mem_get_info(torch.device(resolved.device or "cuda"))[0]
        if resolved.checkpoints == "file":
            free = min(free, _free_disk(resolved))
        return selective if kept <= free / 2 else dataclasses.replace(resolved, recompute_granularity="full")

    def candidates(self, settings: TrainConfig) -> Iterator[TrainConfig]:
        """Settings from the fastest to the smallest, resolved. What was set by hand stays; no number changes."""
        resolved = settings.resolved()
        on_cpu = resolved.device == "cpu"
        places: list[Residency] = ["device", "file"] if on_cpu else ["device", "host", "file"]
        granularities: list[Granularity] = ["selective", "full"]
        if settings.recompute_granularity is not None:
            granularities = [settings.recompute_granularity]
        elif settings.optim == "mezo":
            granularities = ["full"]
        chunks = [resolved.mlp_chunk_tokens]
        if settings.mlp_chunk_tokens is None and not settings.lora_dropout:  # chunks draw other dropout masks
            tokens = resolved.max_length * resolved.per_device_train_batch_size
            chunks = [chunk for chunk in CHUNKS if chunk < tokens]
        returns = [resolved.return_freed_memory]
        if on_cpu and settings.return_freed_memory is None:
            returns = [False, True]

        open_ = [name for name in RESIDENCIES_OF if getattr(settings, name) is None]
        moves: list[dict[str, Any]] = [dict.fromkeys(open_, places[0])]
        for place in places[1:]:
            for name in open_:
                moves.append(moves[-1] | {name: place})
        for move in moves:
            last = move is moves[-1]
            for granularity in granularities if last else granularities[:1]:
                for returned in returns if last else returns[:1]:
                    for chunk in chunks if last else chunks[:1]:
                        yield dataclasses.replace(
                            resolved,
                            recompute_granularity=granularity,
                            mlp_chunk_tokens=chunk,
                            return_freed_memory=returned,
                            **move,
                        )

    def choose(self, settings: TrainConfig) -> Plan:
        """The plan of the first of the candidates that stays inside ``settings.memory_budget``.

        Raises:
            ValueError: none does; it names the smallest peak, of what it is made, and what would help.
        """
        assert settings.memory_budget is not None
        budget = parse_size("memory_budget", settings.memory_budget)
        plans = []
        for candidate in self.candidates(settings):
            plans.append(self.predict(candidate))
            kept = plans[-1].files.get("kept outputs", 0)
            if plans[-1].peak <= budget and kept <= _free_disk(candidate) / 2:
                return plans[-1]
        least = min(plans, key=lambda plan: plan.peak)
        raise ValueError(self._refusal(least, budget))

    def resolve(self, settings: TrainConfig) -> Plan:
        """The plan of ``settings``: chosen by their memory budget, or with the defaults."""
        return self.predict(self.default(settings)) if settings.memory_budget is None else self.choose(settings)

    def _refusal(self, least: Plan, budget: int) -> str:
        top = least.device_peak or least.host_peak
        parts = sorted(top.components.items(), key=lambda part: -part[1])[:4]
        made_of = ", ".join(f"{name} {mib(size)}" for name, size in parts if size)
        settings, helps = least.settings, []
        changes: list[tuple[str, dict[str, Any]]] = [
            ("--optimizer-in-backward", {"optimizer_in_backward": True}),
            ("--per-device-train-batch-size 1", {"per_device_train_batch_size": 1}),
            (f"--max-length {settings.max_length // 2}", {"max_length": max(settings.max_length // 2, 2)}),
        ]
        if settings.optim == "mezo" or settings.gradient_accumulation_steps > 1:
            del changes[0]
        for flag, change in changes:
            changed = dataclasses.replace(settings, **change)
            if changed != settings and (peak := self.predict(changed).peak) < least.peak:
                helps.append(f"{flag} ({mib(peak)})")
        advice = f"; what would help: {', '.join(helps)}" if helps else ""
        return (
            f"memory_budget {mib(budget)} is too small: the smallest plan needs {mib(least.peak)} "
            f"at its {top.name} ({made_of}){advice}"
        )


# Settings on which a traced model depends; one of other settings is traced anew.
TRACED_BY = (
    "max_length",
    "per_device_train_batch_size",
    "lora_r",
    "lora_dropout",
    "target_modules",
    "optim",
    "selection_mode",
    "device",
    "dtype",
    "backend",
    "weights",
)
RESIDENCIES_OF = ("optimizer_state", "checkpoints", "weights")
CHUNKS = (0, 512, 256, 128, 64)


def mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _largest(sizes: list[int], count: int) -> int:
    return sum(sorted(sizes, reverse=True)[:count])


class _Sizes:
    """What the whole model's parts take, from its inventory and what was traced of its first blocks."""

    def __init__(self, inventory: Inventory, model: TracedModel, step: Traced, settings: TrainConfig) -> None:
        kinds = model.kinds
        count = len(kinds)
        place = [kinds.index(kind) for kind in kinds]  # of the traced block of the same kind
        if model.depth > 1 and len(set(kinds)) == 1:
            place = [0] * count
        mezo = settings.optim == "mezo"
        selected = count
        if settings.selection_mode != "full":
            selected = len(select_blocks(0, count, settings.selected_ratio, settings.selection_schedule))
        waiting = count if settings.selection_mode in ("full", "exact") else selected
        lora = lora_config(settings)
        self.lora = [0] * (count + 1)
        for name, info in inventory.matrices.items():
            if name in model.tables or not lora.targets(name):
                continue
            self.lora[_index(info.file, count)] += 4 * lora.rank(name) * sum(info.shape)
        trained = [] if mezo else self.lora
        self.gradients = _largest(trained[:count], selected) + sum(trained[count:])
        self.largest_gradient = max(trained, default=0)
        self.moments, self.largest_moments = 2 * sum(trained), 2 * self.largest_gradient
        self.checkpoints = _largest([step.checkpoint[at] for at in place], waiting)
        self.kept = _largest([step.outputs[at] for at in place], waiting)
        self.one_checkpoint, self.one_kept = max(step.checkpoint), max(step.outputs)
        blocks = [inventory.sizes[block_file(index)] for index in range(count)]
        self.blocks, self.largest_block = sum(blocks), max(blocks)
        self.shared = inventory.sizes[SHARED]
        dtype = model.dtype
        floats = [inventory.files[file][name] for name, file in inventory.floats.items()]
        self.floats = sum(dtype.itemsize * prod(shape) for _, shape in floats)
        plain = [module for module in model.model.modules() if not isinstance(module, Int4Module)]
        self.floats += sum(buffer.nbytes for module in plain for buffer in module.buffers(recurse=False))
        tokens = settings.max_length * settings.per_device_train_batch_size
        self.segment, self.gathered = _table_bytes(inventory, model.tables, tokens)
        self.files = {"store": sum(inventory.sizes.values())}
        if settings.checkpoints == "file" and not mezo:
            self.files |= {"checkpoints": self.checkpoints, "kept outputs": self.kept}
        if settings.optimizer_state == "file" and not mezo:
            self.files["optimizer state"] = self.moments


def _index(file: str, count: int) -> int:
    """The block that a file is of; ``count`` for what is outside of blocks."""
    return count if file == SHARED else int(file.removeprefix("block-").split(".")[0])


# A page fault on a mapped file brings this much in, where it is in the system's cache.
FAULT_AROUND = 64 << 10


def _table_bytes(inventory: Inventory, tables: set[str], tokens: int) -> tuple[int, int]:
    """Resident bytes of the embedding and the head in files: while a segment is read, and while rows are gathered."""
    segment = gathered = 0
    for name in tables:
        tensors = inventory.files[inventory.matrices[name].file]
        packed = tensors[f"{name}.packed"]
        scales = sum(nbytes(tensors[f"{name}.{part}"]) for part in ("scales", "minimum") if f"{name}.{part}" in tensors)
        rows, row_bytes = packed[1]
        step = max(SEGMENT_BYTES // max(1, row_bytes) // SEGMENT_STEP, 1) * SEGMENT_STEP
        segment = max(segment, min(step, rows) * row_bytes + scales)
        gathered = max(gathered, min(nbytes(packed), tokens * (FAULT_AROUND + row_bytes)) + scales)
    return segment, gathered


def _free_disk(settings: TrainConfig) -> int:
    """Bytes that are free where the run's scratch files go."""
    directory = Path(settings.output_dir or ".").absolute()
    existing = next(place for place in (directory, *directory.parents) if place.is_dir())
    return shutil.disk_usage(existing).free


# --- moments --------------------------------------------------------------------------------------------------------

# What a process takes on top of its imports once it has trained a step, beyond tensors: the model's Python objects,
# pages of torch's libraries that were not touched before, MKL's and oneDNN's buffers.
FIRST_STEPS = 34 << 20
# Without ``return_freed_memory`` glibc keeps freed memory in its heap, where small tensors that live on (gradients)
# lie among large ones that went. Measured with one thread, as a part of what activations take: 0.6 to 1.3 for models
# of 6 to 8 blocks, 0.95 for Qwen2.5-0.5B (256 tokens), 3.5 for SmolLM2-135M (512). The plan takes the worst of these.
KEPT_BY_ALLOCATOR = 3.5


def _moments(sizes: _Sizes, step: Traced, settings: TrainConfig, kind: str, framework: int) -> tuple[Moment, ...]:
    """Of the memory in which the model computes: the process's on a CPU, the device's otherwise."""
    on_cpu = kind == "cpu"
    here = ("device", "host") if on_cpu else ("device",)
    in_file = settings.weights not in here
    mezo = settings.optim == "mezo"
    always = {
        "framework": framework + (FIRST_STEPS if on_cpu else 0),
        "other weights": 0 if in_file else sizes.shared,
        "float parameters": sizes.floats,
        "LoRA": sum(sizes.lora),
        "optimizer state": sizes.moments if settings.optimizer_state in here else 0,
    }
    paged = sizes.largest_block if on_cpu else 2 * sizes.largest_block
    weights = paged if in_file else sizes.blocks
    idle = 0 if in_file and on_cpu else weights  # a device's arenas stay
    waits = settings.checkpoints in here
    checkpoints, kept = (sizes.checkpoints, sizes.kept) if waits else (0, 0)
    last = (checkpoints, kept) if step.kept_to_the_end else (sizes.one_checkpoint, sizes.one_kept)
    last = last if waits else (0, 0)
    gradients = sizes.largest_gradient if settings.optimizer_in_backward else sizes.gradients
    early = sizes.gradients if settings.gradient_accumulation_steps > 1 else 0
    early = max(early, sizes.largest_gradient) if not mezo else 0
    one = 0 if settings.optimizer_state in here else sizes.largest_moments
    stepping = one + step.optimizer if settings.optimizer_in_backward else 0
    segment, gathered = (sizes.segment, sizes.gathered) if in_file else (0, 0)
    if not on_cpu:
        # Rows are gathered on the host; of the head, one segment is used, one is coming, one is not yet free again.
        segment, gathered = 3 * segment, 0
    found: dict[str, dict[str, int]] = {}
    found["embedding"] = {"other weights": gathered, "gradients": early, "activations": step.rest}
    waiting = {"checkpoints": checkpoints, "kept outputs": kept, "gradients": early}
    found["forward of the last block"] = waiting | {"weights of blocks": weights, "activations": step.forward}
    found["loss"] = waiting | {"weights of blocks": idle, "loss": step.loss, "other weights": max(segment, gathered)}
    if not mezo:
        found["backward of the top block"] = waiting | {"weights of blocks": weights, "activations": step.backward}
        found["backward of the lowest block"] = {
            "weights of blocks": weights,
            "activations": step.backward,
            "gradients": gradients,
            "checkpoints": last[0],
            "kept outputs": last[1],
            "optimizer state": stepping,
        }
    moments = {"optimizer state": one, "gradients": 0 if settings.optimizer_in_backward else sizes.gradients}
    rest = {"weights of blocks": idle, "activations": step.rest}
    found["optimizer step"] = rest | moments | {"activations": step.rest + step.optimizer}
    if on_cpu and not mezo:
        found["saving a checkpoint"] = rest | {"optimizer state": sizes.moments if one else 0}
    moments_of = {
        name: {key: always.get(key, 0) + more.get(key, 0) for key in COMPONENTS} for name, more in found.items()
    }
    if on_cpu:
        _add_allocator(moments_of, sizes, step, settings)
    return tuple(Moment(name, components) for name, components in moments_of.items())


def _add_allocator(moments: dict[str, dict[str, int]], sizes: _Sizes, step: Traced, settings: TrainConfig) -> None:
    """Adds what glibc's malloc holds and nobody uses. The first step ends with it, so every later moment has it."""
    gradients = max(components["gradients"] for components in moments.values())
    if settings.return_freed_memory:
        for components in moments.values():
            components["allocator"] = gradients - components["gradients"]
        return
    mapped = {
        name: (components["weights of blocks"] + components["other weights"] if settings.weights == "file" else 0)
        + (components["optimizer state"] if settings.optimizer_state == "file" else 0)
        for name, components in moments.items()
    }
    anonymous = {name: sum(components.values()) - mapped[name] for name, components in moments.items()}
    scattered = int(KEPT_BY_ALLOCATOR * (max(step.forward, step.backward, step.loss) - step.rest))
    for name, components in moments.items():
        components["allocator"] = max(anonymous.values()) - anonymous[name] + scattered


def _beside(sizes: _Sizes, settings: TrainConfig, framework: int) -> tuple[Moment, ...]:
    """The process's own memory while a device computes; what CUDA's libraries take is not known before."""
    weights = settings.weights
    components = dict.fromkeys(COMPONENTS, 0) | {
        "framework": framework,
        # Read through two buffers of one block; a copy in host memory is read from where it lies.
        "weights of blocks": {"device": 0, "host": sizes.blocks, "file": 2 * sizes.largest_block}[weights or "device"],
        "other weights": {"device": 0, "host": sizes.shared, "file": sizes.segment}[weights or "device"],
        "optimizer state": sizes.moments if settings.optimizer_state == "host" else 0,
        "checkpoints": sizes.checkpoints if settings.checkpoints == "host" else 0,
        "kept outputs": sizes.kept if settings.checkpoints == "host" else 0,
    }
    if settings.optimizer_state == "file":
        components["optimizer state"] = sizes.moments  # while a checkpoint is saved
    return (Moment("a step", components),)
