"""Settings of a training run: one dataclass, from which the command line and configuration files are read.

Names and meanings are those of transformers, TRL and PEFT where they have one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mebp_triton.blocks.options import Granularity, Mode, Schedule, UnselectedUpdate
from mebp_triton.data.chat import Masking
from mebp_triton.kernels.names import Backend
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.store.residency import Residency
from mebp_triton.system.machine import resolve_device
from mebp_triton.system.units import parse_size
from mebp_triton.training.optimizers.schedules import SchedulerType

Dtype = Literal["float32", "bfloat16", "float16"]
Optim = Literal["adamw", "adamw_8bit", "mezo"]
OnNan = Literal["stop", "skip"]


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a flag of ``mebp train``."""

    train_file: str = _setting(
        "", "what to train on: .txt, .jsonl, .parquet, or a directory of datasets (docs/data.md)"
    )
    validation_file: str | None = _setting(None, "evaluated before and after")
    output_dir: str = _setting("", "the run directory: results, adapter, checkpoint, plots")
    max_steps: int = _setting(0, "optimizer steps; 0 for as many as num_train_epochs make")
    num_train_epochs: int = _setting(1, "passes over the training file, where max_steps is 0")
    max_length: int = _setting(512, "tokens per example")
    packing: bool = _setting(False, "put several training rows into one of max_length, which do not see each other")
    completion_only_loss: bool | None = _setting(None, "mask prompts (default: where rows have prompt and completion)")
    assistant_only_loss: bool = _setting(False, "mask all chat messages but the assistant's")
    max_eval_windows: int | None = _setting(None, "evaluate on that many evenly spaced windows; all by default")
    per_device_train_batch_size: int = _setting(1, "examples per forward pass")
    gradient_accumulation_steps: int = _setting(1, "forward passes per optimizer step")
    lora_r: int = _setting(16, "LoRA rank")
    lora_alpha: float = _setting(32.0, "LoRA scale: alpha / r")
    lora_dropout: float = _setting(0.0, "dropout on the LoRA branch's input")
    use_rslora: bool = _setting(False, "LoRA scale alpha / sqrt(r)")
    target_modules: str = _setting("all-linear", "all-linear, names separated by commas, or a regular expression")
    learning_rate: float = _setting(2e-4, "peak learning rate")
    lr_scheduler_type: SchedulerType = _setting("linear", "decay after the warm-up")
    warmup_steps: int = _setting(0, "steps of linear warm-up")
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    max_grad_norm: float = _setting(1.0, "clip the gradient's global norm; 0 for no clipping")
    optim: Optim = _setting("adamw", "adamw; adamw_8bit: moments in 8 bits; mezo: zeroth order, two forward passes")
    on_nan: OnNan = _setting("stop", "at a loss or gradient that is not finite: stop, or skip the step")
    mezo_epsilon: float = _setting(1e-3, "finite-difference step of mezo")
    seed: int = _setting(42, "of the adapter, the data order, dropout, selection and mezo")
    selection_mode: Mode = _setting("full", "how the gradient passes blocks that are not selected at a step")
    selected_ratio: float = _setting(0.5, "the part of the blocks a step trains, where selection_mode is not full")
    selection_schedule: Schedule = _setting("cyclic", "which blocks a step trains")
    unselected_update: UnselectedUpdate = _setting("momentum", "what AdamW does to blocks that are not selected")
    weights: Residency | None = _setting(None, "where weights lie: device, host or file (default: file on a CPU)")
    checkpoints: Residency | None = _setting(None, "where block inputs wait (default: file on a CPU)")
    optimizer_state: Residency | None = _setting(None, "where AdamW's moments lie (default: file on a CPU)")
    recompute_granularity: Granularity | None = _setting(
        None, "full keeps each block's input; selective its linear layers' outputs too (default: selective if it fits)"
    )
    mlp_chunk_tokens: int | None = _setting(None, "run the MLPs by chunks of that many tokens; 0 for whole (default)")
    optimizer_in_backward: bool = _setting(False, "step each block as soon as its gradients exist, and free them")
    return_freed_memory: bool | None = _setting(
        None, "on a CPU: large freed tensors go back to the system at once, a lower peak, slower (default: off)"
    )
    memory_budget: str | None = _setting(None, "900MiB, 4GB, ...: what is not set by hand is chosen to stay inside")
    device: str | None = _setting(None, "cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    dtype: Dtype | None = _setting(None, "of activations (default: bfloat16 on a GPU, float32 on a CPU)")
    backend: Backend = _setting("auto", "kernels: triton, panel (plain torch), or auto")
    save_steps: int = _setting(100, "write a resumable checkpoint every that many steps, and at the end")

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check_choice(name, kind, getattr(self, name))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, value in vars(self).items():
            if name != "seed" and type(value) is int and value >= 1 << 31:
                raise ValueError(f"{name} must be below 2**31, got {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in ("learning_rate", "mezo_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.selected_ratio <= 1:
            raise ValueError(f"selected_ratio must lie in (0, 1], got {self.selected_ratio}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if self.seed >= 1 << 63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.lora_r > 4096:
            raise ValueError(f"lora_r must be at most 4096, got {self.lora_r}")
        if self.lora_alpha == 0:
            raise ValueError("lora_alpha must not be 0: nothing would be trained")
        if self.dtype == "float16" and self.optim != "mezo":
            raise ValueError("dtype 'float16' loses small gradients: train in bfloat16 or float32")
        if self.memory_budget is not None:
            parse_size("memory_budget", self.memory_budget)
        if self.optim == "mezo" and self.selection_mode != "full":
            raise ValueError(f"selection_mode {self.selection_mode!r} needs gradients, and optim 'mezo' makes none")
        if self.optimizer_in_backward and self.optim == "mezo":
            raise ValueError(
                "optimizer_in_backward steps by gradients, and optim 'mezo' makes none: leave one of them out"
            )
        if self.optim == "mezo" and self.on_nan == "skip":
            raise ValueError(
                "mezo moves the parameters to and fro before it knows the loss, which rounds them, so a step cannot be "
                "left out: on_nan 'stop'"
            )
        if self.optimizer_in_backward and self.on_nan == "skip":
            raise ValueError(
                "optimizer_in_backward has stepped upper blocks when a lower one's gradient is found not to be finite: "
                "on_nan 'skip' cannot undo that, leave one of them out"
            )
        if self.optimizer_in_backward and self.gradient_accumulation_steps != 1:
            raise ValueError(
                "optimizer_in_backward takes a step in every backward pass, so it needs gradient_accumulation_steps 1, "
                f"got {self.gradient_accumulation_steps}: leave one of them out"
            )

    def resolved(self) -> TrainConfig:
        """With the defaults that depend on the machine filled in.

        But ``recompute_granularity``, which depends on the model as well: ``plan.chosen`` fills it in.
        """
        device = resolve_device(self.device)
        place: Residency = "file" if device == "cpu" else "device"
        return dataclasses.replace(
            self,
            device=device,
            dtype=self.dtype or ("float32" if device == "cpu" else "bfloat16"),
            weights=self.weights or place,
            checkpoints=self.checkpoints or place,
            optimizer_state=self.optimizer_state or place,
            mlp_chunk_tokens=self.mlp_chunk_tokens or 0,
            return_freed_memory=bool(self.return_freed_memory),
        )

    def lora(self) -> LoraConfig:
        """The adapter that the settings describe."""
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.targets(),
            use_rslora=self.use_rslora,
        )

    def masking(self) -> Masking:
        """What enters the loss, as the settings say."""
        return Masking(self.completion_only_loss, self.assistant_only_loss)

    def targets(self) -> str | list[str]:
        """``target_modules`` as ``LoraConfig`` takes it: a list where it is names and commas."""
        text = self.target_modules
        names = [name.strip() for name in text.split(",")]
        plain = all(name.replace(".", "").replace("_", "").isalnum() for name in names)
        return names if plain and text != "all-linear" else text


_LEAST = {
    "mlp_chunk_tokens": 0,
    "max_steps": 0,
    "num_train_epochs": 1,
    "max_length": 2,
    "max_eval_windows": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lora_r": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "save_steps": 1,
    "seed": 0,
}


def _check_choice(name: str, kind: Any, value: Any) -> None:
    """ValueError where ``value`` is none of a Literal's values or of another type than the field's."""
    allowed = [part for part in (get_args(kind) if get_origin(kind) not in (None, Literal) else [kind])]
    if value is None and type(None) in allowed:
        return
    for part in allowed:
        if get_origin(part) is Literal:
            if value in get_args(part):
                return
            raise ValueError(f"{name} must be one of {', '.join(get_args(part))}, got {value!r:.200}")
    plain = tuple(part for part in allowed if part is not type(None))
    if isinstance(value, bool) and bool not in plain:
        raise ValueError(f"{name} must be of type {plain[0].__name__}, got {value!r:.200}")
    if not isinstance(value, plain) and not (float in plain and isinstance(value, int)):
        raise ValueError(f"{name} must be of type {plain[0].__name__}, got {value!r:.200}")
