"""Predicts the peak memory of a training run before anything is loaded, and chooses settings that stay inside a budget.

One block of every kind is traced without data (``traced_model``): forward, loss, backward, optimizer step. All others
add what waits in between: block inputs, gradients, moments (``phases``). The peak is that of the highest phase.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mebp_triton.blocks.options import Granularity
from mebp_triton.store.residency import Residency
from mebp_triton.system import atomic, machine, memory
from mebp_triton.system.errors import CannotTrace
from mebp_triton.system.memory import return_free_memory
from mebp_triton.system.units import mib, parse_size
from mebp_triton.training.optimizers.table import OPTIMIZERS
from mebp_triton.training.run_settings import RunSettings, resolve
from mebp_triton.training.settings import TRACED_BY, TrainConfig

from .expert_bytes import ExpertBytes
from .inventory import Inventory
from .phases import CUDA_CONTEXT, Phase, Sizes, joined, phases_beside, phases_here, product_workspaces
from .traced_model import Traced, TracedModel

RESIDENCIES_OF = ("optimizer_state", "checkpoints", "weights")
CHUNKS = (0, 512, 256, 128, 64)


@dataclass(frozen=True)
class Plan:
    """The predicted memory of a run.

    Attributes:
        settings: the settings of the run.
        host: the process's resident set in the phases of a step.
        device: what the device's allocator has given out in them; empty on a CPU.
        shared: whether the device's memory is the host's, so that both count together.
        experts: the bytes of experts of the block that brings in most; zeros where there are none.
        files: bytes on disk: the store, block inputs ("checkpoints") and kept outputs, optimizer state.
    """

    settings: RunSettings
    host: tuple[Phase, ...]
    device: tuple[Phase, ...]
    shared: bool
    files: dict[str, int]
    experts: ExpertBytes = ExpertBytes()

    @property
    def host_peak(self) -> Phase:
        return max(self.host, key=lambda phase: phase.total)

    @property
    def device_peak(self) -> Phase | None:
        return max(self.device, key=lambda phase: phase.total, default=None)

    @property
    def peak(self) -> int:
        """The bytes that a memory budget limits: of the device, of the process if there is none, of both if shared."""
        device = self.device_peak
        if device is None:
            return self.host_peak.total
        return device.total + (self.host_peak.total if self.shared else 0)

    @property
    def reserve(self) -> float:
        """The free memory that a budget must leave beside the peak, as a part of the peak.

        Measured peaks on a CPU were up to 4 % above the plan where freed memory goes back, and up to 11 % where glibc
        keeps it. A device's allocator reserves more than it gives out, and the budget limits what it reserves. How
        much more is not measured yet.
        """
        return 0.05 if self.settings.device == "cpu" and self.settings.return_freed_memory else 0.12

    @property
    def needed(self) -> int:
        """The smallest budget that this plan stays inside."""
        return math.ceil(self.peak * (1 + self.reserve))


class Planner:
    """Predicts the memory of runs with one model, and keeps what it has traced.

    Args:
        inventory: the tensors of the model's store.
        config: the model's config, as transformers reads it.
        framework: the resident set of a process that has imported everything and has trained nothing yet; by default
            that of this process after the first trace.
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

    def traced(self, settings: RunSettings) -> tuple[TracedModel, Traced]:
        key = tuple(getattr(settings, name) for name in TRACED_BY)
        try:
            if key not in self.models:
                self.models[key] = TracedModel(self.inventory, self.config, settings)
            model = self.models[key]
            granularity, checkpoints = settings.recompute_granularity, settings.checkpoints
            return model, model.run(granularity, checkpoints, settings.mlp_chunk_tokens, joined(settings))
        except ValueError:
            raise
        except Exception as error:  # a model's own code may raise anything
            reason = (str(error).splitlines() or [""])[0]
            kind = self.config.model_type
            raise CannotTrace(f"a model of type {kind} cannot be traced: {type(error).__name__}: {reason}") from error

    def predict(self, settings: RunSettings) -> Plan:
        """The memory of a run with these settings in every phase of a step."""
        model, step = self.traced(settings)
        sizes = Sizes(self.inventory, model, step, settings)
        if settings.device == "cpu":
            host = phases_here(sizes, step, settings, "cpu", self.framework)
            return Plan(settings, host, (), False, sizes.files, sizes.experts)
        device = torch.device(settings.device)
        shared = machine.is_unified(device)
        taken = product_workspaces(device, settings.block_graphs) + (CUDA_CONTEXT if shared else 0)
        here = phases_here(sizes, step, settings, "cuda", taken)
        beside = phases_beside(sizes, settings, self.framework)
        return Plan(settings, beside, here, shared, sizes.files, sizes.experts)

    def default(self, asked: TrainConfig) -> RunSettings:
        """The settings that run without a memory budget: outputs are kept if they take at most half of what is free."""
        if asked.recompute_granularity is not None or not OPTIMIZERS[asked.optim].gradients or asked.block_graphs:
            return resolve(asked)
        selective = resolve(asked, recompute_granularity="selective")
        model, step = self.traced(selective)
        kept = Sizes(self.inventory, model, step, selective).kept_outputs
        free = machine.available_memory_bytes()
        if selective.checkpoints == "device" and selective.device != "cpu":
            free = torch.cuda.mem_get_info(torch.device(selective.device))[0]
        if selective.checkpoints == "file":
            free = min(free, _free_disk(selective))
        return selective if kept <= free / 2 else dataclasses.replace(selective, recompute_granularity="full")

    def candidates(self, asked: TrainConfig) -> Iterator[RunSettings]:
        """Yields settings from the fastest to the smallest. What was set by hand stays.

        Results differ by rounding; with dropout, micro-batches that are joined draw other masks than others.
        """
        resolved = resolve(asked)
        on_cpu = resolved.device == "cpu"
        places: list[Residency] = ["device", "file"]
        if not on_cpu and not machine.is_unified(torch.device(resolved.device)):
            places.insert(1, "host")  # where host and device memory are one, it would be a copy in the same memory
        granularities: list[Granularity] = ["selective", "full"]
        if asked.recompute_granularity is not None:
            granularities = [asked.recompute_granularity]
        elif not OPTIMIZERS[asked.optim].gradients or asked.block_graphs:
            granularities = ["full"]
        chunks = [resolved.mlp_chunk_tokens]
        if asked.mlp_chunk_tokens is None and not asked.lora_dropout:  # chunks draw other dropout masks
            tokens = resolved.max_length * resolved.per_device_train_batch_size
            chunks = [chunk for chunk in CHUNKS if chunk < tokens]
        returns = [resolved.return_freed_memory]
        if on_cpu and asked.return_freed_memory is None:
            returns = [False, True]

        # First, one kind of tensor after the other moves to a slower place. Only then is more recomputed, do
        # micro-batches come one by one, is freed memory returned, and do MLPs run by chunks, which cost more time.
        undecided = [name for name in RESIDENCIES_OF if getattr(asked, name) is None]
        moves: list[dict[str, Any]] = [dict.fromkeys(undecided, places[0])]
        for place in places[1:]:
            for name in undecided:
                moves.append(moves[-1] | {name: place})
        for move in moves:
            last = move is moves[-1]
            joins = [asked.join_micro_batches]
            if joins == [None]:
                joins = [resolve(asked, **move).join_micro_batches]
                joins += [False] if last and joins[0] else []
            options = (granularities, joins, returns, chunks)
            for granularity, join, returned, chunk in itertools.product(*options if last else (o[:1] for o in options)):
                yield dataclasses.replace(
                    resolved,
                    recompute_granularity=granularity,
                    join_micro_batches=bool(join),
                    mlp_chunk_tokens=chunk,
                    return_freed_memory=returned,
                    **move,
                )

    def choose(self, asked: TrainConfig) -> Plan:
        """The plan of the first candidate that stays inside ``asked.memory_budget``.

        Raises:
            ValueError: none does. The message has the smallest peak, its components, and what would help.
        """
        assert asked.memory_budget is not None
        budget = parse_size("memory_budget", asked.memory_budget)
        plans = []
        for candidate in self.candidates(asked):
            plans.append(self.predict(candidate))
            kept = plans[-1].files.get("kept outputs", 0) if asked.recompute_granularity is None else 0
            if plans[-1].needed <= budget and kept <= _free_disk(candidate) / 2:
                return plans[-1]
        least = min(plans, key=lambda plan: plan.needed)
        raise ValueError(self._refusal(least, asked.memory_budget))

    def resolve(self, asked: TrainConfig) -> Plan:
        """The plan of the run: chosen to stay inside the memory budget, or that of the defaults if there is none."""
        return self.predict(self.default(asked)) if asked.memory_budget is None else self.choose(asked)

    def _refusal(self, least: Plan, budget: str) -> str:
        top = least.device_peak or least.host_peak
        parts = sorted(top.components.items(), key=lambda part: -part[1])[:4]
        made_of = ", ".join(f"{name} {mib(size)}" for name, size in parts if size)
        settings, helps = least.settings, []
        changes: list[tuple[str, dict[str, Any]]] = [
            ("--optimizer-in-backward", {"optimizer_in_backward": True}),
            ("--per-device-train-batch-size 1", {"per_device_train_batch_size": 1}),
            (f"--max-length {settings.max_length // 2}", {"max_length": max(settings.max_length // 2, 2)}),
        ]
        if not OPTIMIZERS[settings.optim].in_backward or settings.gradient_accumulation_steps > 1:
            del changes[0]
        for flag, change in changes:
            changed = dataclasses.replace(settings, **change)
            if changed != settings and (needed := self.predict(changed).needed) < least.needed:
                helps.append(f"{flag} ({mib(needed)})")
        advice = f"; what would help: {', '.join(helps)}" if helps else ""
        return (
            f"memory_budget {budget} is too small: the smallest plan needs {mib(least.needed)}, which leaves "
            f"{least.reserve:.0%} in reserve; its peak is {mib(least.peak)} at its {top.name} ({made_of}){advice}"
        )


def _free_disk(settings: RunSettings) -> int:
    """Bytes that are free where the run's scratch files go."""
    return shutil.disk_usage(atomic.existing_parent(Path(settings.output_dir or "."))).free
