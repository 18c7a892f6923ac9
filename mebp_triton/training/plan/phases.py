"""Extends what was traced of a few blocks to the memory of the whole model in every phase of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from mebp_triton.blocks.selection import selected_count
from mebp_triton.kernels import native
from mebp_triton.layers.int4_module import GATHERED, Int4Module
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.store.side_copies import IN_FLIGHT
from mebp_triton.store.table_rows import segment_rows
from mebp_triton.training.optimizers.table import OPTIMIZERS
from mebp_triton.training.run_settings import RunSettings

from .expert_bytes import expert_bytes
from .inventory import Inventory, nbytes
from .traced_model import Traced, TracedModel

# "checkpoints" are the block inputs that wait for the backward pass, as in the setting of that name.
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
    "block graphs",
    "loss",
    "allocator",
)

# A page fault on a mapped file makes this much of it resident, where it is in the system's cache.
FAULT_AROUND = 64 << 10
# What a process takes on top of its imports once it has trained a step, beyond tensors: the model's Python objects,
# pages of torch's libraries that were not touched before, MKL's and oneDNN's buffers.
FIRST_STEPS = 34 << 20
# What CUDA's context and the code of its libraries take where the device's memory is the host's. An estimate: PyTorch's
# developers give 300 to 400 MB for a process whose kernels are loaded when they are used (pytorch issues 107667 and
# 109888). It is not measured on a Jetson.
CUDA_CONTEXT = 400 << 20
# What PyTorch gives the library of products for each thread and stream that uses it: 8,519,680 bytes, and 32 MiB on
# sm_90, as which newer devices are counted. The forward and the backward pass have a thread each. Graphs of blocks are
# recorded on a stream of their own.
PRODUCT_WORKSPACE, LARGE_PRODUCT_WORKSPACE = 8_519_680, 32 << 20
# Without ``return_freed_memory`` glibc keeps freed memory in its heap, where small tensors that live on (gradients)
# lie among large ones that went: the more blocks, the more gaps. Measured as a part of what activations take: 0.4 to
# 1.3 for models of 6 to 8 blocks, 0.95 for Qwen2.5-0.5B (24), 1.7 to 2.3 for SmolLM2-135M (30), 2.0 for Qwen2.5-3B
# (36), 2.5 and 3.1 for Gemma-3-4B (34).
KEPT_BY_ALLOCATOR_PER_BLOCK = 0.07
# The same where compiled code computes on a CPU, beside which activations take less: for SmolLM2-135M, 256 tokens, 610
# to 666 MiB were measured in thirteen runs, and 0.07 would plan 600.
KEPT_BESIDE_COMPILED_CODE = 0.2


@dataclass(frozen=True)
class Phase:
    """A phase of a step, and the bytes that every component has at its highest in it."""

    name: str
    components: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.components.values())


class Sizes:
    """Bytes of the whole model's parts, from its inventory and from what was traced of its first blocks.

    Attributes:
        count: the number of blocks.
        lora: adapter parameters per block, and last those outside of blocks.
        gradients, largest_gradient: of all that one step trains, and of the largest block.
        state, largest_state: optimizer state of all blocks, and of the largest.
        block_inputs, kept_outputs: what waits for the backward pass; ``one_block_input``, ``one_kept_outputs``: the
            largest share of one block.
        blocks, largest_block: weights of all blocks, and of the largest. shared: of the file beside them.
        experts: those of the block that brings in most; largest_resident: weights of a block without experts that no
            token is routed to.
        outside: weights of linear layers outside of blocks, which are always resident.
        floats: parameters and buffers that are not int4; largest_floats: parameters of one block among them.
        segment, gathered: resident bytes of the embedding and the head in files, see ``_table_bytes``.
        files: bytes on disk, by what they hold.
    """

    def __init__(self, inventory: Inventory, model: TracedModel, step: Traced, settings: RunSettings) -> None:
        kinds = model.kinds
        self.count = count = len(kinds)
        place = [kinds.index(kind) for kind in kinds]  # of the traced block that stands for each block
        optimizer = OPTIMIZERS[settings.optim]
        selected = count if settings.selection_mode == "full" else selected_count(count, settings.selected_ratio)
        waiting = count if settings.selection_mode in ("full", "exact") else selected
        lora = model.lora
        self.lora = [0] * (count + 1)
        for name, info in inventory.matrices.items():
            parameter = model.expert_parameters.get(name)
            adapted = lora.targets(name) if parameter is None else lora.targets_parameter(parameter)
            if name not in model.tables and adapted:
                self.lora[_block_of(info.file, count)] += 4 * lora.rank(parameter or name) * sum(info.shape)
        trained = self.lora if optimizer.gradients else []
        self.gradients = _sum_of_largest(trained[:count], selected) + sum(trained[count:])
        self.largest_gradient = max(trained, default=0)
        state = [optimizer.state_bytes(size // 4) for size in self.lora]
        self.state, self.largest_state = sum(state), max(state)
        self.block_inputs = _sum_of_largest([step.block_input[at] for at in place], waiting)
        self.kept_outputs = _sum_of_largest([step.outputs[at] for at in place], waiting)
        self.one_block_input, self.one_kept_outputs = max(step.block_input), max(step.outputs)
        blocks = [inventory.sizes[block_file(index)] for index in range(count)]
        self.blocks, self.largest_block = sum(blocks), max(blocks)
        pass_tokens = settings.max_length * settings.per_device_train_batch_size
        tokens = pass_tokens * joined(settings)
        experts = expert_bytes(inventory, model, pass_tokens, tokens)
        self.experts = max(experts, key=lambda one: one.most)
        self.largest_resident = max(size - one.every + one.most for size, one in zip(blocks, experts, strict=True))
        self.shared = inventory.sizes[SHARED]
        self.outside = _outside(inventory, model.tables)
        floats = [inventory.files[file][name] for name, file in inventory.floats.items()]
        self.floats = sum(model.dtype.itemsize * prod(shape) for _, shape in floats)
        of_blocks = [0] * (count + 1)
        for name, file in inventory.floats.items():
            of_blocks[_block_of(file, count)] += model.dtype.itemsize * prod(inventory.files[file][name][1])
        self.largest_floats = max(of_blocks[:count], default=0)
        others = [module for module in model.model.modules() if not isinstance(module, Int4Module)]
        self.floats += sum(buffer.nbytes for module in others for buffer in module.buffers(recurse=False))
        self.segment, self.gathered = _table_bytes(inventory, model.tables, tokens)
        self.files = {"store": sum(inventory.sizes.values())}
        if settings.checkpoints == "file" and optimizer.gradients:
            self.files |= {"checkpoints": self.block_inputs, "kept outputs": self.kept_outputs}
        if settings.optimizer_state == "file" and self.state:
            self.files["optimizer state"] = self.state

    def graphs(self, step: Traced) -> int:
        """What graphs of blocks hold on to beside what blocks take that run: their memory pool and static buffers.

        The pool holds what the largest pass computes. The buffers hold a block's adapter, its gradients, the adapter in
        16 or 32 bits, the other parameters, and a few tensors of the size of a block's input.
        """
        passes = max(step.forward, step.backward) - step.rest
        return passes + 3 * max(self.lora[: self.count], default=0) + self.largest_floats + 4 * self.one_block_input


def joined(settings: RunSettings) -> int:
    """How many micro-batches go through the blocks together."""
    return settings.gradient_accumulation_steps if settings.join_micro_batches else 1


def _sum_of_largest(sizes: list[int], count: int) -> int:
    return sum(sorted(sizes, reverse=True)[:count])


def _outside(inventory: Inventory, tables: set[str]) -> int:
    """Bytes of the linear layers outside of any block."""
    matrices = [info for name, info in inventory.matrices.items() if info.file == SHARED and name not in tables]
    return sum(nbytes(tensor) for info in matrices for tensor in info.tensors().values())


def _block_of(file: str, count: int) -> int:
    """The block whose file this is; ``count`` for the file of what lies outside of blocks."""
    return count if file == SHARED else int(file.removeprefix("block-").split(".")[0])


def _table_bytes(inventory: Inventory, tables: set[str], tokens: int) -> tuple[int, int]:
    """Resident bytes of the embedding and the head in files: while a segment is read, and while rows are gathered."""
    segment = gathered = 0
    for name in tables:
        tensors = inventory.matrices[name].tensors()
        packed = tensors.pop("packed")
        scales = sum(map(nbytes, tensors.values()))
        rows, row_bytes = packed[1]
        segment = max(segment, min(segment_rows(row_bytes), rows) * row_bytes + scales)
        gathered = max(gathered, min(nbytes(packed), min(tokens, GATHERED) * (FAULT_AROUND + row_bytes)) + scales)
    return segment, gathered


def phases_here(sizes: Sizes, step: Traced, settings: RunSettings, kind: str, framework: int) -> tuple[Phase, ...]:
    """The phases of a step in the memory that the model computes in.

    Args:
        kind: "cpu" for the resident set of the process, "cuda" for the device's memory.
        framework: bytes that are taken before anything of the run is loaded.
    """
    on_cpu = kind == "cpu"
    here = ("device", "host") if on_cpu else ("device",)  # the residencies that count in this memory
    always = {
        "framework": framework + (FIRST_STEPS if on_cpu else 0),
        "other weights": sizes.shared if settings.weights in here else sizes.outside,
        "float parameters": sizes.floats,
        "LoRA": sum(sizes.lora),
        "optimizer state": sizes.state if settings.optimizer_state in here else 0,
        "block graphs": sizes.graphs(step) if settings.block_graphs else 0,
    }
    varying = _varying(sizes, step, settings, on_cpu, here)
    components = {
        name: {key: always.get(key, 0) + more.get(key, 0) for key in COMPONENTS} for name, more in varying.items()
    }
    if on_cpu:
        _add_allocator(components, sizes, step, settings)
    return tuple(Phase(name, of_phase) for name, of_phase in components.items())


def _varying(
    sizes: Sizes, step: Traced, settings: RunSettings, on_cpu: bool, here: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """Bytes per phase of what is not there, or not as large, in the whole step."""
    has_backward, in_backward = OPTIMIZERS[settings.optim].gradients, settings.optimizer_in_backward
    weights = idle_weights = sizes.blocks
    segment = gathered = 0
    if settings.weights not in here:
        if on_cpu:  # the pages of one block are resident while it computes
            weights, idle_weights, segment, gathered = sizes.largest_resident, 0, sizes.segment, sizes.gathered
        else:
            # Two arenas stay, so that the next block comes while one computes. Of the head, one segment is used, one
            # is coming, and one is not yet free again. Rows of the embedding are gathered on the host.
            weights = idle_weights = 2 * sizes.largest_block
            segment = 3 * sizes.segment
    all_waiting = last_waiting = {"checkpoints": 0, "kept outputs": 0}
    if settings.checkpoints in here:
        all_waiting = {"checkpoints": sizes.block_inputs, "kept outputs": sizes.kept_outputs}
        last_waiting = {"checkpoints": sizes.one_block_input, "kept outputs": sizes.one_kept_outputs}
        last_waiting = all_waiting if step.kept_to_the_end else last_waiting
    elif settings.checkpoints == "host":  # beside the device: some are on their way to the host, or from there
        all_waiting = last_waiting = {"checkpoints": IN_FLIGHT * step.largest_waiting, "kept outputs": 0}
    gradients = sizes.largest_gradient if in_backward else sizes.gradients
    # Gradients of earlier micro-batches are there from the start; of a single one, the top block's are the first.
    early = sizes.largest_gradient
    if settings.gradient_accumulation_steps > 1:
        early = max(early, sizes.gradients)
    paged_state = 0 if settings.optimizer_state in here else sizes.largest_state
    if settings.optimizer_state == "host":
        paged_state *= 1 + IN_FLIGHT  # those of the next group come while one group's are used
    waiting = all_waiting | {"gradients": early}
    computing = {"weights of blocks": weights}
    phases = {
        "embedding": {"other weights": gathered, "gradients": early, "activations": step.rest},
        "forward of the last block": waiting | computing | {"activations": step.forward},
        "loss": waiting
        | {"weights of blocks": idle_weights, "loss": step.loss, "other weights": max(segment, gathered)},
    }
    if has_backward:
        stepping = {"optimizer state": paged_state + step.optimizer if in_backward else 0, "gradients": gradients}
        phases["backward of the top block"] = waiting | computing | {"activations": step.backward}
        phases["backward of the lowest block"] = last_waiting | computing | stepping | {"activations": step.backward}
    phases["optimizer step"] = {
        "weights of blocks": idle_weights,
        "activations": step.rest + step.optimizer,
        "optimizer state": paged_state,
        "gradients": 0 if in_backward else sizes.gradients,
    }
    return phases


def _add_allocator(phases: dict[str, dict[str, int]], sizes: Sizes, step: Traced, settings: RunSettings) -> None:
    """Adds what glibc's malloc holds and nobody uses. The first step ends with it, so every later phase has it."""
    gradients = max(components["gradients"] for components in phases.values())
    if settings.return_freed_memory:
        for components in phases.values():
            components["allocator"] = gradients - components["gradients"]
        return
    mapped = {
        name: (components["weights of blocks"] + components["other weights"] if settings.weights == "file" else 0)
        + (components["optimizer state"] if settings.optimizer_state == "file" else 0)
        for name, components in phases.items()
    }
    anonymous = {name: sum(components.values()) - mapped[name] for name, components in phases.items()}
    compiled = settings.device == "cpu" and native.instructions() is not None
    share = (KEPT_BESIDE_COMPILED_CODE if compiled else KEPT_BY_ALLOCATOR_PER_BLOCK) * sizes.count
    scattered = int(share * (max(step.forward, step.backward, step.loss) - step.rest))
    for name, components in phases.items():
        components["allocator"] = max(anonymous.values()) - anonymous[name] + scattered


def product_workspaces(device: torch.device, graphs: bool) -> int:
    """What the library of products takes of a device's memory; of one that is not here, as on the newest ones.

    Args:
        graphs: whether blocks are graphs.
    """
    older = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (9, 0)
    threads, streams = 2, 2 if graphs else 1
    return threads * streams * (PRODUCT_WORKSPACE if older else LARGE_PRODUCT_WORKSPACE)


def phases_beside(sizes: Sizes, settings: RunSettings, framework: int) -> tuple[Phase, ...]:
    """The one phase of the process's own memory while a device computes."""
    weights = settings.weights
    components = dict.fromkeys(COMPONENTS, 0) | {
        "framework": framework,
        # A file is read through two buffers of one block; a copy in host memory is read from where it lies.
        "weights of blocks": {"device": 0, "host": sizes.blocks, "file": 2 * sizes.largest_block}[weights],
        "other weights": {
            "device": 0,
            "host": sizes.shared,
            "file": max(sizes.segment, sizes.gathered),
        }[weights],
        "optimizer state": sizes.state if settings.optimizer_state == "host" else 0,
        "checkpoints": sizes.block_inputs if settings.checkpoints == "host" else 0,
        "kept outputs": sizes.kept_outputs if settings.checkpoints == "host" else 0,
    }
    if settings.optimizer_state == "file":
        components["optimizer state"] = sizes.largest_state
    return (Phase("a step", components),)
