"""From what was traced of a few blocks to the memory of the whole model at the moments of a step."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mebp_triton.blocks.selection import selected_count
from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.store.dynamic8 import encoded_bytes
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.store.table_rows import segment_rows
from mebp_triton.training.run_settings import RunSettings

from .inventory import Inventory, nbytes
from .traced_model import Traced, TracedModel

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


def _largest(sizes: list[int], count: int) -> int:
    return sum(sorted(sizes, reverse=True)[:count])


class Sizes:
    """What the whole model's parts take, from its inventory and what was traced of its first blocks."""

    def __init__(self, inventory: Inventory, model: TracedModel, step: Traced, settings: RunSettings) -> None:
        kinds = model.kinds
        self.count = count = len(kinds)
        place = [kinds.index(kind) for kind in kinds]  # of the traced block of the same kind
        mezo = settings.optim == "mezo"
        selected = count
        if settings.selection_mode != "full":
            selected = selected_count(count, settings.selected_ratio)
        waiting = count if settings.selection_mode in ("full", "exact") else selected
        lora = settings.lora()
        self.lora = [0] * (count + 1)
        for name, info in inventory.matrices.items():
            if name in model.tables or not lora.targets(name):
                continue
            self.lora[_index(info.file, count)] += 4 * lora.rank(name) * sum(info.shape)
        trained = [] if mezo else self.lora
        self.gradients = _largest(trained[:count], selected) + sum(trained[count:])
        self.largest_gradient = max(trained, default=0)
        state = [_moments_bytes(size // 4, settings.optim == "adamw_8bit") for size in trained]
        self.moments, self.largest_moments = sum(state), max(state, default=0)
        self.checkpoints = _largest([step.checkpoint[at] for at in place], waiting)
        self.kept = _largest([step.outputs[at] for at in place], waiting)
        self.one_checkpoint, self.one_kept = max(step.checkpoint), max(step.outputs)
        blocks = [inventory.sizes[block_file(index)] for index in range(count)]
        self.blocks, self.largest_block = sum(blocks), max(blocks)
        self.shared = inventory.sizes[SHARED]
        self.outside = _outside(inventory, model.tables)
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


def _moments_bytes(parameters: int, eight_bit: bool) -> int:
    return 2 * (encoded_bytes(parameters) if eight_bit else 4 * parameters)


def _outside(inventory: Inventory, tables: set[str]) -> int:
    """Bytes of the linear layers outside of any block, which are always resident."""
    names = [name for name, info in inventory.matrices.items() if info.file == SHARED and name not in tables]
    tensors = inventory.files[SHARED]
    parts = ("packed", "scales", "minimum", "codebook")
    return sum(nbytes(tensors[key]) for name in names for part in parts if (key := f"{name}.{part}") in tensors)


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
        segment = max(segment, min(segment_rows(row_bytes), rows) * row_bytes + scales)
        gathered = max(gathered, min(nbytes(packed), tokens * (FAULT_AROUND + row_bytes)) + scales)
    return segment, gathered


# What a process takes on top of its imports once it has trained a step, beyond tensors: the model's Python objects,
# pages of torch's libraries that were not touched before, MKL's and oneDNN's buffers.
FIRST_STEPS = 34 << 20
# Without ``return_freed_memory`` glibc keeps freed memory in its heap, where small tensors that live on (gradients)
# lie among large ones that went: the more blocks, the more gaps. Measured as a part of what activations take: 0.4 to
# 1.3 for models of 6 to 8 blocks, 0.95 for Qwen2.5-0.5B (24), 1.7 to 2.3 for SmolLM2-135M (30), 2.0 for Qwen2.5-3B
# (36), 2.5 and 3.1 for Gemma-3-4B (34).
KEPT_BY_ALLOCATOR_PER_BLOCK = 0.07


def moments_here(sizes: Sizes, step: Traced, settings: RunSettings, kind: str, framework: int) -> tuple[Moment, ...]:
    """Of the memory in which the model computes: the process's on a CPU, the device's otherwise."""
    on_cpu = kind == "cpu"
    here = ("device", "host") if on_cpu else ("device",)
    in_file = settings.weights not in here
    mezo = settings.optim == "mezo"
    always = {
        "framework": framework + (FIRST_STEPS if on_cpu else 0),
        "other weights": sizes.outside if in_file else sizes.shared,
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
    moments_of = {
        name: {key: always.get(key, 0) + more.get(key, 0) for key in COMPONENTS} for name, more in found.items()
    }
    if on_cpu:
        _add_allocator(moments_of, sizes, step, settings)
    return tuple(Moment(name, components) for name, components in moments_of.items())


def _add_allocator(moments: dict[str, dict[str, int]], sizes: Sizes, step: Traced, settings: RunSettings) -> None:
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
    share = KEPT_BY_ALLOCATOR_PER_BLOCK * sizes.count
    scattered = int(share * (max(step.forward, step.backward, step.loss) - step.rest))
    for name, components in moments.items():
        components["allocator"] = max(anonymous.values()) - anonymous[name] + scattered


def moments_beside(sizes: Sizes, settings: RunSettings, framework: int) -> tuple[Moment, ...]:
    """The process's own memory while a device computes; what CUDA's libraries take is not known before."""
    weights = settings.weights
    components = dict.fromkeys(COMPONENTS, 0) | {
        "framework": framework,
        # Read through two buffers of one block; a copy in host memory is read from where it lies.
        "weights of blocks": {"device": 0, "host": sizes.blocks, "file": 2 * sizes.largest_block}[weights],
        "other weights": {
            "device": 0,
            "host": sizes.shared,
            "file": max(sizes.segment, sizes.gathered),
        }[weights],
        "optimizer state": sizes.moments if settings.optimizer_state == "host" else 0,
        "checkpoints": sizes.checkpoints if settings.checkpoints == "host" else 0,
        "kept outputs": sizes.kept if settings.checkpoints == "host" else 0,
    }
    if settings.optimizer_state == "file":
        components["optimizer state"] = sizes.largest_moments
    return (Moment("a step", components),)
